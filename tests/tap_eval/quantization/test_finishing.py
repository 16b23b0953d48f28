"""A finished network is nearer to full precision, however its layers are reached."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tap_eval.measuring.accuracy import mean_kl
from tap_eval.measuring.bench import Bench
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.program import record
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.factor import Factor
from tap_eval.quantization.finishing import finish, finish_all
from tap_eval.quantization.moments import Sums
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork, QuantizedWeight
from tap_eval.quantization.rounding import in_blocks

MEMORY = 2**26


def opened(network: nn.Module, x: Tensor) -> QuantizedNetwork:
    prepared = prepare(network.eval(), x[:2])
    return QuantizedNetwork(prepared, calibrate(prepared, x))


def everywhere(network: QuantizedNetwork, weights: int, activations: int = 8) -> Allocation:
    count = len(network.layers)
    return Allocation((weights,) * count, (activations,) * count)


def unchosen(network: QuantizedNetwork) -> list[float]:
    return [0.0] * len(network.layers)


def assert_same(first: list[QuantizedWeight], second: list[QuantizedWeight]) -> None:
    """In nearly all channels: a half may fall otherwise in float32, and all behind it in its channel with it."""
    alike, count = 0, 0
    for one, other in zip(first, second, strict=True):
        same = (one.integers == other.integers).flatten(1).all(1)
        alike, count = alike + int(same.sum()), count + len(same)
        assert torch.allclose(one.scale[same], other.scale[same], rtol=1e-4)
        assert torch.allclose(one.bias[same], other.bias[same], rtol=1e-3, atol=1e-3)
    assert alike >= 0.9 * count


class Branches(nn.Module):
    """Layers side by side and one after the other, grouped and depthwise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide, self.last = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return self.last((self.wide(y).relu() + self.deep(y)).mean((2, 3)))


@pytest.mark.parametrize("batch", [12, 6, 5])
def test_a_network_whose_steps_are_recorded_is_finished_as_one_whose_steps_are_not(batch: int) -> None:
    network, x = Branches(), torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    quantized = opened(network, x)
    allocation = everywhere(quantized, 3)
    advanced: list[None] = []
    apart = finish(quantized, None, x, allocation, unchosen(quantized), MEMORY, lambda: advanced.append(None))
    assert len(advanced) == 4
    program = record(quantized.prepared, x[:1].expand(batch, -1, -1, -1).contiguous())
    assert_same(finish(quantized, program, x, allocation, unchosen(quantized), MEMORY), apart)


def test_the_mean_output_of_a_layer_is_that_of_full_precision() -> None:
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = Branches()
    quantized = opened(network, x)
    for bits in (2, 8):
        finish(quantized, None, x, everywhere(quantized, bits, activations=4), unchosen(quantized), MEMORY)
        assert torch.allclose(quantized.logits(x, 16).mean(0), network(x).mean(0), atol=1e-4)


def test_a_layer_on_which_gptq_was_worse_than_the_nearest_keeps_its_integers_and_gets_a_bias() -> None:
    x, network = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), Branches()
    quantized = opened(network, x)
    before = [layer.quantized(2) for layer in quantized.layers]
    found = finish(quantized, None, x, everywhere(quantized, 2, activations=4), [math.inf] * 4, MEMORY)
    for one, other in zip(found, before, strict=True):
        assert torch.equal(one.integers, other.integers)
        assert torch.equal(one.scale, other.scale)
    assert torch.allclose(quantized.logits(x, 16).mean(0), network(x).mean(0), atol=1e-4)


def test_the_weights_that_are_given_are_those_that_the_network_is_left_with() -> None:
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    quantized = opened(Branches(), x)
    allocation = Allocation((2, (2, 8) * 4, 4, (3, 4, 3, 8, 2)), (8,) * 4)
    found = finish(quantized, None, x, allocation, unchosen(quantized), MEMORY)
    left = quantized.logits(x, 16)
    for weight, bits in zip(found, allocation.weights, strict=True):
        tops = 2 ** (torch.tensor(bits).expand(len(weight.integers)) - 1) - 1
        assert bool((weight.integers.flatten(1).abs().amax(1) <= tops).all())
    assert int(found[1].integers[1::2].abs().max()) > 1
    quantized.choose(None)
    quantized.take(found, allocation.activations)
    assert torch.equal(quantized.logits(x, 16), left)


@pytest.mark.parametrize("memory", [MEMORY, 2**16])
def test_allocations_that_are_finished_together_are_those_finished_alone(memory: int) -> None:
    x = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    allocations = [Allocation(bits, (8,) * 4) for bits in ((2, 3, 4, 8), (4, 4, 2, 2), (2, (2, 8) * 4, 4, 3))]
    dampings = [[0.02, 2.0, math.inf, 0.0], [0.2] * 4, [0.0, 0.0, 0.2, 0.02]]
    networks = [opened(Branches(), x) for _ in allocations]
    program = record(networks[0].prepared, x[:6].contiguous())
    together = finish_all(networks, program, x, allocations, dampings, memory)
    for allocation, each, found in zip(allocations, dampings, together, strict=True):
        alone = finish(opened(Branches(), x), program, x, allocation, each, memory)
        for mine, theirs in zip(alone, found, strict=True):
            assert torch.equal(mine.integers, theirs.integers)
            assert torch.equal(mine.scale, theirs.scale)
            assert torch.equal(mine.bias, theirs.bias)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_finished_network_is_nearer_to_full_precision(bench: Bench, bits: int) -> None:
    images, pixels = bench.splits.search.pixels, bench.splits.calibrations[0].pixels
    quantized = QuantizedNetwork(bench.prepared, calibrate(bench.prepared, pixels))
    allocation = everywhere(quantized, bits)
    expected = quantized.logits(images, 100)
    quantized.choose(allocation)
    before = mean_kl(expected, quantized.logits(images, 100))
    finish(quantized, None, pixels, allocation, unchosen(quantized), MEMORY)
    assert mean_kl(expected, quantized.logits(images, 100)) < 0.5 * before


def test_moments_in_blocks_finish_a_network_too(bench: Bench) -> None:
    images, pixels = bench.splits.search.pixels, bench.splits.calibrations[0].pixels
    quantized = QuantizedNetwork(bench.prepared, calibrate(bench.prepared, pixels))
    allocation = everywhere(quantized, 2)
    expected = quantized.logits(images, 100)
    quantized.choose(allocation)
    before = mean_kl(expected, quantized.logits(images, 100))
    finish(quantized, None, pixels, allocation, unchosen(quantized), 2**14)
    assert mean_kl(expected, quantized.logits(images, 100)) < before


class Flat(nn.Module):
    """Its third layer has more inputs than it sees images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.wide, self.last = nn.Linear(16 * 100, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wide(self.deep(self.conv(x).relu()).relu().flatten(1)).relu())


def smooth(count: int, seed: int) -> Tensor:
    """Images (N, 3, 10, 10) of twelve that are blurred, mixed, so that what a layer's inputs say is nearly the same."""
    basis = nn.functional.avg_pool2d(torch.randn(12, 3, 14, 14, generator=torch.Generator().manual_seed(0)), 5, 1) * 5
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.einsum("nk,kchw->nchw", torch.randn(count, 12, generator=draw) / 3.5, basis)
    return mixed + 0.1 * torch.randn(mixed.shape, generator=draw)


@pytest.mark.parametrize("memory", [MEMORY, 2**20, 2**17])
def test_a_layer_with_more_inputs_than_images_is_not_taken_too_far_by_blocks_of_them(memory: int) -> None:
    x, test = smooth(16, 1), smooth(64, 2)
    quantized = opened(Flat(), x)
    allocation = everywhere(quantized, 3)
    with torch.no_grad():
        expected = Flat().eval()(test)
    quantized.choose(allocation)
    before = float((quantized.logits(test, 16) - expected).square().mean())
    finish(quantized, None, x, allocation, unchosen(quantized), memory)
    after = float((quantized.logits(test, 16) - expected).square().mean())
    assert after < 0.85 * before


@pytest.mark.parametrize("positions", [16, 2048])
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_no_number_of_blocks_takes_outputs_further_from_those_that_are_wanted(blocks: int, positions: int) -> None:
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(512, 32).requires_grad_(False)
    layer.weight.normal_(0, 512**-0.5, generator=draw)

    def alike() -> Tensor:
        return torch.randn(positions, 20, generator=draw) @ torch.randn(20, 512, generator=draw)

    x = (alike() + torch.randn(positions, 512, generator=draw)).relu()
    got = x + 0.1 * torch.randn(positions, 512, generator=draw) + 0.15 * alike()
    wanted = layer(x) - layer(x).mean(0)
    sums = Sums(layer, 512 // blocks, positions, compared=True)
    sums.take(got, wanted)
    moments = sums.moments()
    moved = Factor.of(moments, 0.1).moved(in_blocks(layer.weight, *moments.mean.shape), sums.lost())
    weight = moved.transpose(1, 2).reshape(32, 512)

    def missing(weight: Tensor) -> float:
        return float(((got - got.mean(0)) @ weight.T - wanted).square().mean())

    assert missing(weight) < (0.1 if positions == 16 or blocks == 1 else 0.7) * missing(layer.weight)


class Twice(nn.Module):
    """Calls a layer twice, and another for images alone that are darker than black."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.rare, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.conv(x).relu()).mean((2, 3))
        return self.last(self.rare(y) if x.min() < -1 else y)


def test_a_layer_that_is_called_twice_stays_and_so_does_one_that_is_not_reached() -> None:
    x, dark = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((2, 3, 8, 8), -2.0)
    prepared = prepare(Twice().eval(), x[:2], [x, dark])
    assert [layer.name for layer in prepared.layers] == ["conv", "last", "rare"]
    quantized = QuantizedNetwork(prepared, calibrate(prepared, x))
    allocation = everywhere(quantized, 2)
    before = [layer.quantized(2) for layer in quantized.layers]
    advanced: list[None] = []
    found = finish(quantized, None, x, allocation, unchosen(quantized), MEMORY, lambda: advanced.append(None))
    assert len(advanced) == 1
    assert (found[0], found[2]) == (before[0], before[2])
    assert not torch.equal(found[1].bias, before[1].bias)


class Again(Twice):
    """The same without what depends on the image, whose steps can be recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rare(self.conv(self.conv(x).relu()).mean((2, 3))))


def test_a_layer_that_is_called_twice_stays_where_steps_are_recorded() -> None:
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    quantized = opened(Again(), x)
    program = record(quantized.prepared, x[:8].contiguous())
    before = [layer.quantized(2) for layer in quantized.layers]
    found = finish(quantized, program, x, everywhere(quantized, 2), unchosen(quantized), MEMORY)
    assert [one is other for one, other in zip(found, before, strict=True)] == [True, False, False]


def test_one_image_is_enough(bench: Bench) -> None:
    pixels = bench.splits.calibrations[0].pixels[:1]
    quantized = QuantizedNetwork(bench.prepared, calibrate(bench.prepared, pixels))
    finish(quantized, None, pixels, everywhere(quantized, 4), unchosen(quantized), MEMORY)
    assert bool(quantized.logits(bench.splits.search.pixels, 100).isfinite().all())
