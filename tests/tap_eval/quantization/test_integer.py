"""The integer path gives what the simulated one gives, and the sweep what one pass a layer gives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.images.images import Splits
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.layer_errors import layer_errors, layer_errors_one_by_one
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.networks.resnet import CifarResNet
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.program import bind, record
from tap_eval.quantization import integer
from tap_eval.quantization.agreement import multiplied_otherwise, recorded_otherwise
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.integer import IntegerNetwork, KeptWeights
from tap_eval.quantization.quantizer import Allocation, LayerBits, QuantizedNetwork, QuantizedWeight
from tests.tap_eval.preparing.networks import IMAGES, TOKENS, Net, PaddedLikeTensorFlow, randomized
from tests.tap_eval.quantization.processor import SCALES_AS_SIMULATED

MOST = 8 if integer.exact() else 7
"""bits of weights that this CPU multiplies exactly by bytes"""


class Odd(nn.Module):
    """Padding, a value with two readers, a layer called often, others cut off or never read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = PaddedLikeTensorFlow(3, 8, 3, stride=2)
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        self.deep, self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.twice = nn.Conv2d(16, 16, 1)
        self.unused, self.small = nn.Conv2d(3, 2, 1), nn.Hardtanh(0, 1)
        self.head = nn.Linear(16 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        x = self.act(self.norm(self.stem(x)))
        x = torch.cat([self.deep(x), self.wide(x).relu() - x], 1)
        x = x + self.twice(self.small(self.twice(x).relu_()))
        x = self.small(self.twice(x)) - nn.functional.hardtanh(self.twice(x), -2, 1)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


def vit() -> nn.Module:
    network = models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
    nn.init.normal_(network.heads[0].weight)
    return network


NETWORKS = {
    "resnet20": (lambda: CifarResNet(20), 32),
    "mobilenet": (lambda: models.mobilenet_v2(num_classes=10, width_mult=0.35), 64),
    "vit": (vit, 32),
    "odd": (Odd, 16),
}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[Prepared, QuantizedNetwork, torch.Tensor]:
    make, size = NETWORKS[request.param]
    torch.manual_seed(0)
    network = randomized(make())
    pixels = torch.rand(41, 3, size, size)
    prepared = prepare(network, pixels[:2])
    return prepared, QuantizedNetwork(prepared, calibrate(prepared, pixels[:16])), pixels


def drawn(prepared: Prepared, rng: random.Random, activations: tuple[int, ...] = (8,)) -> Allocation:
    """Random bits, in every other layer by output channel."""
    weights: list[LayerBits] = [
        tuple(rng.choice((2, 3, 4, MOST)) for _ in range(layer.out_channels))
        if layer.index % 2
        else rng.choice((2, 4, MOST))
        for layer in prepared.layers
    ]
    return Allocation(tuple(weights), tuple(rng.choice(activations) for _ in prepared.layers))


@SCALES_AS_SIMULATED
@pytest.mark.parametrize("activations", [(8,), (4, 6, 8)], ids=["A8", "mixed activations"])
def test_integers_give_what_the_simulated_path_gives(
    case: tuple[Prepared, QuantizedNetwork, torch.Tensor], activations: tuple[int, ...]
) -> None:
    prepared, simulated, pixels = case
    program = record(prepared, pixels[:16])
    for seed in range(3):
        allocation = drawn(prepared, random.Random(seed), activations)
        fast = IntegerNetwork(simulated, program, allocation.activations, KeptWeights(2**30))
        fast.choose(allocation)
        simulated.choose(allocation)
        expected, got = simulated.logits(pixels, 41), fast.logits(pixels)
        assert got.shape == expected.shape
        apart = (got - expected).abs().amax(1) / expected.abs().max()
        assert apart.median() <= 1e-5
        assert (apart > 2e-3).sum() <= 4, "of 41 images: a sum that lies midway may be rounded the other way"
        assert multiplied_otherwise(fast, program, simulated, pixels[:16]) is None


def test_a_program_computes_what_the_network_computes(case: tuple[Prepared, QuantizedNetwork, torch.Tensor]) -> None:
    prepared, _, pixels = case
    program = record(prepared, torch.zeros_like(pixels[:16]))
    bound = bind(program, prepared.modules)
    with torch.inference_mode():
        got = bound.run(bound.begin(bound.padded(pixels[:9])))[:9]
        assert torch.allclose(got, prepared(pixels[:9]), atol=1e-4)


def test_one_sweep_gives_the_layer_errors_of_one_pass_a_layer(
    case: tuple[Prepared, QuantizedNetwork, torch.Tensor],
) -> None:
    prepared, simulated, pixels = case
    pixels = pixels[:17]  # a batch, and one that is not full
    swept = layer_errors(simulated, record(prepared, pixels[:16]), pixels, [2, 4])
    expected = layer_errors_one_by_one(simulated, pixels, 41, [2, 4])
    assert torch.allclose(torch.tensor(swept), torch.tensor(expected), rtol=1e-3, atol=1e-7)
    assert len(swept) == len(prepared.layers)


def test_weights_are_the_same_however_they_lie_in_memory(
    case: tuple[Prepared, QuantizedNetwork, torch.Tensor],
) -> None:
    def strided(tensor: torch.Tensor) -> torch.Tensor:
        """With another value behind each, and its dimensions in another order."""
        turned = tensor.permute(*range(tensor.dim() - 1, -1, -1))
        return torch.stack([turned, turned + 1], -1).select(-1, 0).permute(*range(tensor.dim() - 1, -1, -1))

    prepared, simulated, pixels = case
    network = IntegerNetwork(simulated, record(prepared, pixels[:16]), (8,) * len(prepared.layers), KeptWeights(2**30))
    weights = [layer.quantized(4) for layer in simulated.layers]
    network.take(weights)
    expected = network.logits(pixels)
    spread = [QuantizedWeight(*(strided(getattr(each, part)) for part in vars(each))) for each in weights]
    assert not any(each.scale.is_contiguous() or each.bias.is_contiguous() for each in spread)
    network.take(spread)
    assert torch.equal(network.logits(pixels), expected)


def test_packed_weights_are_kept_within_their_bound(case: tuple[Prepared, QuantizedNetwork, torch.Tensor]) -> None:
    prepared, simulated, pixels = case
    largest = max(layer.params for layer in prepared.layers)
    program, few = record(prepared, pixels[:16]), KeptWeights(2 * largest)
    tight = IntegerNetwork(simulated, program, (8,) * len(prepared.layers), few)
    loose = IntegerNetwork(simulated, program, (8,) * len(prepared.layers), KeptWeights(2**30))
    for seed in range(3):
        for network in (tight, loose):
            network.choose(drawn(prepared, random.Random(seed)))
        assert few.size <= 2 * largest
        assert torch.equal(tight.logits(pixels), loose.logits(pixels))


def test_a_network_that_cannot_be_recorded_is_measured_on_the_simulated_path(
    splits: Splits, tmp_path_factory: pytest.TempPathFactory
) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x.flatten(1))
            return y if y.mean() > 0 else -y

    task = Task(Choices(), Budget.parse("4bit"))
    bench = Bench("branching", Branching(), splits, task, Ledger(tmp_path_factory.mktemp("l") / "ledger.sqlite"))
    assert "cannot be recorded" in str(bench.unfit)
    assert bench.measure(uniform(bench.layers, 4)).count == len(splits.search)
    assert len(bench.layer_errors) == 1


def test_a_cpu_without_exact_products_falls_back_and_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "exact", lambda bits=8: False)
    assert "overflow" in str(bench.unfit)
    assert bench.measure(uniform(bench.layers, 4)).top1 > 0.9


@SCALES_AS_SIMULATED
def test_both_paths_measure_the_same_accuracy(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert bench.unfit is None
    allocations = [drawn(bench.prepared, random.Random(seed)) for seed in range(4)]
    fast = [bench.measure(allocation) for allocation in allocations]
    monkeypatch.setattr(integer, "exact", lambda bits=8: False)
    simulated = Bench("digits", bench.prepared.network, bench.splits, bench.task, Ledger(tmp_path / "ledger.sqlite"))
    assert simulated.unfit
    assert [simulated.measure(allocation) for allocation in allocations] == fast


WRITINGS = {
    **{case: (make, False) for case, (make, _) in IMAGES.items()},
    **{case: (make, True) for case, (make, _) in TOKENS.items()},
    "replicate": (lambda: nn.Conv2d(3, 8, 3, padding=(2, 1), padding_mode="replicate"), False),
}


@pytest.mark.parametrize("case", WRITINGS)
def test_both_paths_agree_however_a_product_is_written(case: str) -> None:
    make, tokens = WRITINGS[case]
    torch.manual_seed(0)
    network = Net(make(), 8, tokens).eval()
    pixels = torch.randn(9, 3, 16, 16)
    prepared = prepare(network, pixels[:2])
    simulated, program = QuantizedNetwork(prepared, calibrate(prepared, pixels)), record(prepared, pixels[:4])
    assert recorded_otherwise(prepared, program, pixels[4:8]) is None
    for activations in (8, 5):
        allocation = uniform(prepared.layers, 4, activations)
        fast = IntegerNetwork(simulated, program, allocation.activations, KeptWeights(2**30))
        fast.choose(allocation)
        simulated.choose(allocation)
        assert multiplied_otherwise(fast, program, simulated, pixels[4:8]) is None


@pytest.mark.parametrize("saturates", [True, False], ids=["without VNNI", "as it is here"])
def test_weights_of_eight_bits_are_multiplied_without_overflow(
    saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if saturates:
        monkeypatch.setattr(integer, "saturates", lambda: True)
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 3, 2, 1, groups=2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(392, 5))
    for layer in (*layers, network[-1]):
        nn.init.constant_(layer.weight, 0.01)  # all weights are as large as they can be
    pixels = torch.rand(4, 1, 16, 16).clamp(0.9)
    prepared = prepare(network.eval(), pixels)
    simulated, program = QuantizedNetwork(prepared, calibrate(prepared, pixels)), record(prepared, pixels)
    fast = IntegerNetwork(simulated, program, (8,) * 4, KeptWeights(2**30))
    fast.choose(uniform(prepared.layers, 8))
    simulated.choose(uniform(prepared.layers, 8))
    assert multiplied_otherwise(fast, program, simulated, pixels) is None
