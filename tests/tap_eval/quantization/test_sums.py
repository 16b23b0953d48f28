"""What travels in integers between layers, and that both paths compute it as arithmetic says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from tap_eval.allocation.choices import uniform
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.program import Program, Step, record
from tap_eval.quantization import integer, kernels
from tap_eval.quantization.agreement import multiplied_otherwise
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.finishing import finish
from tap_eval.quantization.integer import IntegerNetwork, KeptWeights
from tap_eval.quantization.quantizer import Affine, Allocation, QuantizedNetwork
from tap_eval.quantization.sums import Carried, Sums, carried, convolutions, ranges

MOST = 8 if integer.exact() else 7
"""bits of weights that this CPU multiplies exactly by bytes"""


class Residual(nn.Module):
    """Sums, one of them with zeros in new channels, ReLU6, maximum pooling, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), one(8, 8)
        self.down, self.again, self.last = nn.Conv2d(8, 16, 3, 2, padding=1), one(16, 16), nn.Linear(16, 5)
        for layer in (self.stem, self.first, self.second, self.down, self.again):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x).relu(), 2)
        x = (self.second(self.first(x).relu()) + x).relu()
        y = F.relu6(self.down(x))
        x = F.relu6(self.again(y) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.last((x + y).mean((2, 3)))


def one(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def recorder(network: nn.Module, pixels: Tensor) -> tuple[QuantizedNetwork, Callable[[int], Program]]:
    """With sums in integers, calibrated on `pixels`."""
    prepared = prepare(network.eval(), pixels[:2])

    @cache
    def recorded(batch: int) -> Program:
        return record(prepared, pixels[:1].expand(batch, *pixels.shape[1:]).contiguous())

    sums = Sums(ranges(recorded(4), prepared.modules, pixels), recorded)
    return QuantizedNetwork(prepared, calibrate(prepared, pixels), sums=sums), recorded


def found(network: nn.Module, size: int = 16) -> dict[str, Carried]:
    """What travels in integers, by the name of the value that is rounded."""
    quantized, recorded = recorder(network, torch.rand(4, 3, size, size))
    program = recorded(4)
    return {str(each.value): each for each, _ in quantized.carried(program.steps, program.logits)}


class Exact:
    """The same in float64, written by hand: what is rounded, and where."""

    def __init__(self, quantized: QuantizedNetwork, network: Residual, pixels: Tensor, bits: int, sums: bool) -> None:
        self.network, self.sums = network, sums
        names = ["stem", "first", "second", "down", "again", "last"]
        assert [layer.name for layer in quantized.prepared.layers] == names
        self.weights = {name: layer.quantized(bits) for name, layer in zip(names, quantized.layers, strict=True)}
        self.raised = {8: 1, 3: 16}[bits]
        """so that the greatest integer is at most 64, but for 8 bits"""
        self.seen: dict[str, tuple[float, float]] = {}
        self.scale = 1.0
        """of what was rounded last"""
        self.full = True
        self(pixels)
        self.full = False

    def integers(self, name: str, x: Tensor) -> Tensor:
        """`x` rounded to 8 bits by the range that this value has in full precision."""
        if self.full:
            self.seen[name] = min(float(x.min()), 0), max(float(x.max()), 0)
            return x
        low, high = self.seen[name]
        self.scale = (high - low) / 255
        zero = round(-low / self.scale)
        return (x / self.scale).round().clamp(-zero, 255 - zero) * self.scale

    def layer(self, name: str, x: Tensor, **given: Any) -> Tensor:
        module = getattr(self.network, name)
        weight, bias = module.weight.double(), module.bias.double()
        if not self.full:
            weight, bias = self.weights[name].real().double(), self.weights[name].bias.double()
            unit = self.weights[name].scale.double() / self.raised * self.scale
            bias = (bias / unit).round() * unit
        return F.linear(x, weight, bias) if name == "last" else F.conv2d(x, weight, bias, **given)

    def between(self, name: str, x: Tensor) -> Tensor:
        return self.integers(name, x) if self.sums or self.full else x

    def __call__(self, x: Tensor) -> Tensor:
        x = self.layer("stem", self.integers("pixels", x.double()), padding=1).relu()
        x = self.between("stem", F.max_pool2d(x, 2))
        y = self.integers("first", self.layer("first", self.integers("stem", x), padding=1).relu())
        x = self.between("sum", (self.between("second", self.layer("second", y)) + x).relu())
        y = self.layer("down", self.integers("sum", x), stride=2, padding=1).clamp(0, 6)
        y = self.between("wide", y)
        z = self.between("again", self.layer("again", self.integers("wide", y)))
        x = (z + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).clamp(0, 6)
        x = self.between("both", self.between("cut", x) + y)
        return self.layer("last", self.integers("mean", x.mean((2, 3))))


@pytest.mark.parametrize("bits", [8, 3])
def test_the_simulated_path_is_what_arithmetic_in_float64_gives(bits: int) -> None:
    pixels = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    network = Residual()
    quantized, _ = recorder(network, pixels)
    quantized.choose(uniform(quantized.prepared.layers, bits))
    got = quantized.logits(pixels, 4)
    with torch.no_grad():
        expected, apart = (Exact(quantized, network, pixels, bits, sums)(pixels) for sums in (True, False))
    size = float(expected.abs().max())
    off, seen = ((each - expected).abs().amax(1) / size for each in (got.double(), apart))
    assert float((off < 1e-5).double().mean()) > 0.7, "an image of which a rounding falls otherwise is rare"
    assert float(off.max()) < 0.01
    assert float(seen.median()) > 1e-3, "rounding sums is to be seen"
    quantized.choose(None)
    assert torch.allclose(quantized.logits(pixels, 4), network(pixels), atol=1e-5), "full precision rounds nothing"


class Shared(nn.Module):
    """A value that two layers and a sum read, with a pad between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = one(3, 8), nn.Conv2d(8, 8, 3), one(8, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last((self.left(F.pad(x, (1, 1, 1, 1))) + self.right(x) + x).mean((2, 3)))


class Inception(nn.Module):
    """Branches that are concatenated, a mean among them, and a value that is concatenated and read besides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = one(3, 8), nn.Conv2d(8, 8, 3, padding=1), one(8, 8)
        self.next, self.last = one(24, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        pooled = F.avg_pool2d(x, 3, 1, 1)
        narrow = self.narrow(x)
        x = self.next(torch.cat([self.wide(x).relu(), F.max_pool2d(narrow, 3, 1, 1), pooled], 1))
        return self.last((x + narrow).amax((2, 3)))


class Floating(nn.Module):
    """SiLU after a convolution, a sum that LayerNorm alone reads, and a linear layer's output in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next, self.third = one(3, 8), one(8, 8), one(8, 8)
        self.norm, self.wide, self.last = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.stem(x))
        y = (self.next(y) + self.third(y)).flatten(2).transpose(1, 2)
        y = self.norm(y)
        return self.last((self.wide(y) + y).mean(1))


class Ending(nn.Module):
    """What it gives is a mean of a convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = one(3, 8), one(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x).relu()).mean((2, 3))


class Shuffled(nn.Module):
    """Halves of a value go different ways, and channels are shuffled; a ReLU and a sum read the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.next, self.last = one(3, 16), one(8, 8), one(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        kept, other = self.stem(x).chunk(2, 1)
        x = torch.cat([kept, self.branch(other).relu()], 1)
        x = self.next(x.view(x.shape[0], 2, 8, *x.shape[2:]).transpose(1, 2).reshape(x.shape))
        return self.last((x.relu() + x).mean((2, 3)))


Expected = dict[str, tuple[int | None, bool]]
"""By the name of a value: the layer whose input's range it has, and whether that alone reads it."""
CASES: dict[str, tuple[Callable[[], nn.Module], Expected]] = {
    "residual": (
        Residual,
        {
            "getitem": (1, False), "relu_1": (2, True), "layer_2": (None, False), "relu_2": (3, False),
            "hardtanh": (4, False), "layer_4": (None, False), "hardtanh_1": (None, False), "add_2": (None, False),
            "mean": (5, True),
        },
    ),
    "two layers and a sum": (
        Shared,
        {
            "layer": (1, False), "layer_1": (None, False), "layer_2": (None, False), "add": (None, False),
            "add_1": (None, False), "mean": (3, True),
        },
    ),
    "concatenated": (
        Inception,
        {
            "relu": (1, False), "layer_1": (None, False), "cat": (3, True), "layer_3": (None, False),
        },
    ),
    "between operators in float": (
        Floating, {"layer": (None, False), "layer_1": (None, False), "layer_2": (None, False)},
    ),
    "what the network gives": (Ending, {"relu": (1, True), "layer_1": (None, False)}),
    "shuffled": (
        Shuffled,
        {"layer": (None, False), "cat": (2, True), "layer_2": (None, False), "add": (None, False), "mean": (3, True)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_travels_in_integers_is_what_convolutions_give_and_is_made_of_that(case: str) -> None:
    make, expected = CASES[case]
    assert {name: (each.layer, each.alone) for name, each in found(make()).items()} == expected


@pytest.mark.parametrize("lends", [True, False], ids=["quantized tensors", "without"])
@pytest.mark.parametrize("activations", [(8,), (8, 4)], ids=["A8", "mixed activations"])
@pytest.mark.parametrize("case", CASES)
def test_integers_give_what_the_simulated_path_gives(
    case: str, activations: tuple[int, ...], lends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not lends:
        monkeypatch.setattr(kernels, "_lends", lambda: False)
    pixels = torch.rand(9, 3, 16, 16)
    quantized, recorded = recorder(CASES[case][0](), pixels)
    count = len(quantized.layers)
    allocation = Allocation((MOST,) * count, tuple(activations[index % len(activations)] for index in range(count)))
    fast = IntegerNetwork(quantized, recorded(4), allocation.activations, KeptWeights(2**30))
    fast.choose(allocation)
    quantized.choose(allocation)
    assert multiplied_otherwise(fast, recorded(4), quantized, pixels[:4]) is None
    got, expected = fast.logits(pixels), quantized.logits(pixels, 4)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def given(**keywords: Any) -> Callable[[Step], Step]:
    """With other keywords for the function of a step."""
    return lambda step: replace(step, function=partial(step.function, **keywords))


SHIFTED = Affine(0.02, 7, 8)
FAULTS: dict[str, tuple[str, Callable[[Step], Step], str]] = {
    "a convolution ends in other bytes": ("layer_2", given(then=SHIFTED), "second"),
    "a sum ends in other bytes": ("relu_2", given(to=SHIFTED), "relu_2 after second"),
    "a sum takes bytes for others": ("hardtanh_1", given(of_other=SHIFTED), "hardtanh_1 after again"),
    "a mean takes bytes for others": ("mean", given(of=SHIFTED), "mean after again"),
    "another mean": ("mean", given(function=torch.ops.aten.amax.default), "mean after again"),
    "zeros that are none": (
        "constant_pad_nd",
        lambda step: replace(step, args=(*step.args[:2], 9.0)),
        "constant_pad_nd after again",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_sum_is_named_by_its_step(fault: str) -> None:
    pixels = torch.rand(4, 3, 16, 16)
    quantized, recorded = recorder(Residual(), pixels)
    fast = IntegerNetwork(quantized, recorded(4), (8,) * len(quantized.layers), KeptWeights(2**30))
    fast.choose(uniform(quantized.prepared.layers, MOST))
    quantized.choose(uniform(quantized.prepared.layers, MOST))
    assert multiplied_otherwise(fast, recorded(4), quantized, pixels) is None
    name, change, place = FAULTS[fault]
    assert any(str(step.value) == name for step in fast.program.steps)
    steps = [change(step) if str(step.value) == name else step for step in fast.program.steps]
    fast.program = replace(fast.program, steps=tuple(steps))
    assert multiplied_otherwise(fast, recorded(4), quantized, pixels) == place


def test_additions_pooling_and_activations_cost_one_step_each_on_bytes() -> None:
    pixels = torch.rand(4, 3, 16, 16)
    quantized, recorded = recorder(Residual(), pixels)
    fast = IntegerNetwork(quantized, recorded(4), (8,) * len(quantized.layers), KeptWeights(2**30))
    fast.choose(uniform(quantized.prepared.layers, MOST))
    with torch.inference_mode():
        known, kinds = fast.program.begin(pixels), []
        for step in fast.program.steps:
            step.run(known)
            kinds.append((str(step.value), known[step.value].dtype))
    assert [name for name, kind in kinds if kind is torch.float32] == ["layer_5"], "the logits alone are in float"
    assert len(kinds) == 15


def exported(network: nn.Module, pixels: Tensor) -> tuple[list[Step], Any]:
    """Its steps as torch.export gives them for any number of images, and their result."""
    program = torch.export.export(network, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    nodes = list(program.run_decompositions({}).graph.nodes)
    products, steps = [torch.ops.aten.conv2d.default, torch.ops.aten.linear.default], []
    for node in nodes:
        if node.op == "call_function" and node.target in products:
            layer = sum(step.layer is not None for step in steps)
            steps.append(Step(node, node.target, node.args[:1], {}, layer=layer))
        elif node.op == "call_function":
            steps.append(Step(node, node.target, node.args, node.kwargs))
    return steps, nodes[-1].args[0][0]


@pytest.mark.parametrize("make", [*(make for make, _ in CASES.values()), partial(models.squeezenet1_1, num_classes=5)])
def test_an_exported_network_carries_the_same_values_in_the_same_order(make: Callable[[], nn.Module]) -> None:
    network, pixels = make().eval(), torch.rand(4, 3, 64, 64)
    prepared = prepare(network, pixels[:2])
    recorded = record(prepared, pixels)
    layers = convolutions(prepared.modules)
    expected = carried(recorded.steps, layers, recorded.logits)
    steps, result = exported(network, pixels)
    got = carried(steps, layers, result)
    assert [(each.layer, each.alone) for each in got] == [(each.layer, each.alone) for each in expected]
    assert len(got) > 1
    for one, other in zip(got, expected, strict=True):
        assert one.value.meta["val"].shape[1:] == other.value.meta["val"].shape[1:]


def test_the_steps_of_another_network_are_refused() -> None:
    quantized, _ = recorder(Residual(), torch.rand(4, 3, 16, 16))
    _, recorded = recorder(Ending(), torch.rand(4, 3, 16, 16))
    with pytest.raises(ValueError, match="zip"):
        quantized.carried(recorded(4).steps, recorded(4).logits)


class Twice(nn.Module):
    """Pads a value for two layers, which read it with other bits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.stem(x), (1, 0, 2, 1))
        return self.last((self.left(x) - self.right(x)).mean((2, 3)))


@pytest.mark.parametrize("sums", [False, True], ids=["float", "int8"])
def test_what_is_padded_for_layers_with_other_bits_is_judged(sums: bool) -> None:
    pixels = torch.rand(4, 3, 16, 16)
    torch.manual_seed(0)
    quantized, recorded = recorder(Twice(), pixels)
    if not sums:
        quantized.sums = None
    allocation = Allocation((MOST,) * 4, (8, 8, 4, 8))
    fast = IntegerNetwork(quantized, recorded(4), allocation.activations, KeptWeights(2**30))
    fast.choose(allocation)
    quantized.choose(allocation)
    assert multiplied_otherwise(fast, recorded(4), quantized, pixels) is None


def test_a_finished_network_knows_what_is_rounded_between_its_layers() -> None:
    pixels = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    quantized, recorded = recorder(Residual(), pixels)
    allocation = uniform(quantized.prepared.layers, 4)
    found = finish(quantized, recorded(4), pixels, allocation, [0.0] * 6, 2**26)
    full, got = quantized.prepared(pixels), quantized.logits(pixels, 4)
    assert torch.allclose(got.mean(0), full.mean(0), atol=1e-3 * float(full.abs().max())), "biases make up for sums"
    quantized.sums = None
    quantized.choose(allocation)
    apart = finish(quantized, recorded(4), pixels, allocation, [0.0] * 6, 2**26)
    assert any(not torch.equal(one.bias, other.bias) for one, other in zip(found, apart, strict=True))
