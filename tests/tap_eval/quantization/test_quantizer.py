"""Integers, scales, bias correction, and switching between allocations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tap_eval.allocation.choices import uniform
from tap_eval.images.images import Images, Transform
from tap_eval.kept import Kept
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.measurer import Measurer
from tap_eval.measuring.recipe import Bounds, Recipe
from tap_eval.preparing.prepare import prepare
from tap_eval.proxies.features import describe
from tap_eval.quantization.calibration import calibrate, observe
from tap_eval.quantization.quantizer import Affine, Allocation, QuantizedNetwork, QuantizedWeight, output_mean
from tap_eval.quantization.rounding import nearest


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_symmetric_integers_with_a_scale_of_least_error(bits: int) -> None:
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(bits))
    rounded, top = nearest(weight, bits), 2 ** (bits - 1) - 1
    scale = rounded.scale
    assert rounded.integers.abs().max() <= top

    def error(scales: torch.Tensor) -> torch.Tensor:
        flat = weight.flatten(1)
        return (flat - (flat / scales[:, None]).round().clamp(-top, top) * scales[:, None]).square().sum(1)

    peak = weight.flatten(1).abs().amax(1)
    best = torch.stack([error(peak * factor / top) for factor in torch.linspace(0.2, 1.2, 200)]).amin(0)
    assert bool((error(scale) <= best * (1.01 if bits < 8 else 1.1)).all())


def test_zero_channels_stay_zero() -> None:
    weight = torch.zeros(2, 3, 1, 1)
    weight[0] = 1
    rounded = nearest(weight, 4)
    assert not rounded.integers[1].any()
    assert bool(rounded.scale.isfinite().all())


def test_activations_hold_zero_exactly_and_clip_to_their_range() -> None:
    affine = Affine.covering(-1.0, 3.0, 8)
    x = torch.tensor([0.0, -1.0, 3.0, 99.0, -99.0])
    real = affine.centred(x) * affine.scale
    assert real[0] == 0
    assert real[1:3].tolist() == pytest.approx([-1.0, 3.0], abs=affine.scale)
    assert real[3:].tolist() == pytest.approx([3.0, -1.0], abs=affine.scale)
    assert Affine.covering(0.5, 2.0, 8).zero_point == 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False),
        nn.Conv2d(4, 8, (1, 3), dilation=(1, 2), groups=2),
        nn.Linear(5, 7),
    ],
    ids=["conv", "depthwise strided", "grouped dilated", "linear"],
)
def test_the_mean_output_follows_from_the_mean_patch(layer: nn.Conv2d | nn.Linear) -> None:
    x = torch.randn(3, 4, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(3, 11, 5)
    y = layer(x)
    expected = y.mean((0, 2, 3)) if isinstance(layer, nn.Conv2d) else y.mean((0, 1))
    bias = 0 if layer.bias is None else layer.bias
    assert torch.allclose(output_mean(layer.weight, observe(layer, x).mean_patch) + bias, expected, atol=1e-5)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_quantization_does_not_shift_the_mean_of_a_layer_on_the_calibration_images(padding_mode: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode=padding_mode), nn.AdaptiveAvgPool2d(1))
    x = torch.rand(4, 3, 8, 8)
    prepared = prepare(network, x)
    quantized = QuantizedNetwork(prepared, calibrate(prepared, x))
    quantized.layers[0].choose(2, None)
    assert torch.allclose(quantized.logits(x, 4).mean(0), network(x).mean((0, 2, 3)), atol=1e-5)


def test_a_layer_that_is_called_twice_and_has_two_names_is_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 3, 3, padding=1)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(10 * self.first(x)).mean((2, 3))

    network = Twice()
    stored = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), np.uint8)
    images = Images(stored, torch.zeros(4), Transform(mean=(0.0,) * 3, std=(1.0,) * 3))
    x = images.pixels
    prepared = prepare(network, x)
    assert [layer.name for layer in prepared.layers] == ["first"]
    (seen,) = calibrate(prepared, x)
    with torch.no_grad():
        middle = 10 * network.first(x)
    both = torch.cat([x, middle])
    assert (seen.low, seen.high) == pytest.approx((float(both.min()), float(both.max())))
    apart = [observe(network.first, part) for part in (x, middle)]
    assert torch.allclose(seen.mean_patch, (apart[0].mean_patch + apart[1].mean_patch) / 2, atol=1e-5)
    (features,) = describe(prepared, images, "statistics")
    assert features["input_absmax"] == pytest.approx(float(both.abs().max()))
    quantized = QuantizedNetwork(prepared, [seen])
    quantized.choose(Allocation((2,), (8,)))
    weight = quantized.layers[0].quantized(2)
    affine = Affine.covering(seen.low, seen.high, 8)
    unit = weight.scale / 64 * affine.scale
    bias = (weight.bias / unit).round() * unit

    def call(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(affine.centred(x) * affine.scale, weight.real(), bias, padding=1)

    assert torch.allclose(quantized.logits(x, 4), call(10 * call(x)).mean((2, 3)), atol=1e-4)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_bias_is_a_whole_number_of_what_kernels_in_integers_add_up(bits: int) -> None:
    affine, generator = Affine(0.0234, 17, 8), torch.Generator().manual_seed(bits)
    rounded = nearest(torch.randn(6, 5, generator=generator), bits)
    bias = torch.tensor([0.0, 1.0, -3.7, 1e-6, 1e7, -1e11])
    weight = QuantizedWeight(rounded.integers, rounded.scale, bias, torch.full((6,), bits))

    whole = weight.with_whole_bias(affine)

    factor = {2: 64, 3: 16, 4: 8, 5: 4, 6: 2, 7: 1, 8: 1}[bits]
    unit = whole.scale.double() / factor * affine.scale
    units = whole.bias.double() / unit
    assert torch.allclose(units, units.round(), rtol=1e-7, atol=1e-6)
    assert float(units.abs().max()) < 2**31 - 2**24
    assert float(((whole.bias - bias).abs() / unit).max()) <= 0.5 + 2**7, "float32 holds 24 digits of 30"
    assert torch.equal(whole.integers[:4], weight.integers[:4])
    assert bool(((whole.real() - weight.real()).abs().amax(1) <= 0.5 * whole.scale)[4:].all())
    again = whole.with_whole_bias(affine)
    assert all(torch.equal(*pair) for pair in zip(vars(whole).values(), vars(again).values(), strict=True))


def test_bits_a_channel_take_each_channel_from_its_own_bits() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))
    x = torch.rand(4, 3, 8, 8)
    prepared = prepare(network, x)
    quantized = QuantizedNetwork(prepared, calibrate(prepared, x))

    def output(bits: int | tuple[int, ...]) -> torch.Tensor:
        quantized.choose(Allocation((bits,), (8,)))
        return quantized.logits(x, 4)

    mixed, two, eight = output((2, 8, 8, 2)), output(2), output(8)
    assert torch.equal(mixed[:, [0, 3]], two[:, [0, 3]])
    assert torch.equal(mixed[:, [1, 2]], eight[:, [1, 2]])


def test_an_allocation_leaves_no_trace_on_the_next(bench: Bench) -> None:
    recipe = Recipe("nearest", (8,), bench.digest, Kept(None))
    measurer = Measurer(bench.prepared, bench.splits, uniform(bench.layers, 8), Bounds(packed=2**20), recipe)
    quantized = measurer.network(0)
    pixels = bench.splits.search.pixels
    first, second = Allocation((2,) * 10, (8,) * 10), Allocation((4,) * 10, (8,) * 10)
    quantized.choose(first)
    expected = quantized.logits(pixels, 100)
    quantized.choose(second)
    quantized.logits(pixels, 100)
    quantized.choose(first)
    assert torch.equal(quantized.logits(pixels, 100), expected)


def test_eight_bits_are_almost_full_precision_and_two_are_not(bench: Bench) -> None:
    full = bench.measure(None).top1
    assert bench.measure(Allocation((8,) * 10, (8,) * 10)).top1 > full - 0.01
    assert bench.measure(Allocation((2,) * 10, (8,) * 10)).top1 < full - 0.3
