"""Faults in one step are found and named; roundings that fall otherwise are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.allocation.choices import uniform
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.program import Program, Step, record
from tap_eval.quantization import integer
from tap_eval.quantization.agreement import multiplied_otherwise, recorded_otherwise
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.integer import IntegerNetwork, KeptWeights
from tap_eval.quantization.quantizer import Affine, QuantizedNetwork

MOST = 8 if integer.exact() else 7
"""bits of weights that this CPU multiplies exactly by bytes"""


class Steps(nn.Module):
    """Bytes from layer to layer, padded and cut by ReLU6, and steps in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.padded, self.cut = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 2), nn.Conv2d(8, 16, 3, padding=1)
        self.last = nn.Linear(16, 5)
        for layer in (self.first, self.padded, self.cut):
            nn.init.normal_(layer.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.padded(F.pad(self.first(x), (1, 2, 0, 1))))
        x = F.relu6(self.cut(x))
        return self.last(F.gelu(x - 1).mean((2, 3)))


class Residual(nn.Module):
    """Zeros padded evenly and unevenly, sums that layers and later sums read, and ReLU6 that bytes do by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 5, groups=8)
        self.down, self.wide = nn.Conv2d(8, 8, 3, 2, groups=8), nn.Conv2d(8, 16, 1)
        self.narrow, self.again, self.last = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        for layer in (self.stem, self.deep, self.down, self.wide, self.narrow, self.again):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(4 * self.stem(F.pad(x, (0, 1, 0, 1))))
        x = self.down(F.pad(F.relu6(self.deep(F.pad(x, (2, 2, 2, 2)))), (0, 1, 0, 1)))
        x = x + self.narrow(F.relu6(self.wide(x)))
        x = F.relu(self.again(x) + x)
        return self.last(x.mean((2, 3)))


class Both(NamedTuple):
    """The two paths of a network, with the same bits."""

    prepared: Prepared
    program: Program
    fast: IntegerNetwork
    simulated: QuantizedNetwork
    pixels: Tensor

    @property
    def place(self) -> str | None:
        return multiplied_otherwise(self.fast, self.program, self.simulated, self.pixels)


def both(network: nn.Module) -> Both:
    pixels = torch.randn(4, 3, 16, 16)
    prepared = prepare(network.eval(), pixels)
    simulated, program = QuantizedNetwork(prepared, calibrate(prepared, pixels)), record(prepared, pixels)
    allocation = uniform(prepared.layers, MOST)
    fast = IntegerNetwork(simulated, program, allocation.activations, KeptWeights(2**30))
    fast.choose(allocation)
    simulated.choose(allocation)
    return Both(prepared, program, fast, simulated, pixels)


def altered(program: Program, name: str, change: Callable[[Step], Step]) -> Program:
    """`program` with another step of this name."""
    assert any(str(step.value) == name for step in program.steps)
    return replace(program, steps=tuple(change(step) if str(step.value) == name else step for step in program.steps))


def read(index: int, change: Callable[[Affine], Affine]) -> Callable[[Both], None]:
    """A layer that takes its bytes for other numbers than they are."""

    def fault(case: Both) -> None:
        layer = case.fast.layers[index]
        layer.affine = change(layer.affine)
        layer.packed = layer.pack(layer.quantized.quantized(8))

    return fault


def weighed(index: int, name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Both], None]:
    """Another scale or bias beside the packed weight."""

    def fault(case: Both) -> None:
        packed = case.fast.layers[index].packed
        assert packed is not None
        case.fast.layers[index].packed = replace(packed, **{name: change(getattr(packed, name))})

    return fault


def stepped(name: str, change: Callable[[Step], Step]) -> Callable[[Both], None]:
    """Another step."""

    def fault(case: Both) -> None:
        case.fast.program = altered(case.fast.program, name, change)

    return fault


def given(**keywords: Any) -> Callable[[Step], Step]:
    """With other keywords than the function of a step was given."""
    return lambda step: replace(step, function=partial(step.function, **keywords))


def argued(*args: Any) -> Callable[[Step], Step]:
    """With other arguments after the first."""
    return lambda step: replace(step, args=(step.args[0], *args))


def shifted(affine: Affine) -> Affine:
    return replace(affine, zero_point=affine.zero_point + 1)


FAULTS: dict[str, tuple[Callable[[Both], None], str]] = {
    "zero point": (read(0, shifted), "first"),
    "zero point of a convolution with padding": (read(2, shifted), "cut"),
    "scale of the input": (read(1, lambda affine: replace(affine, scale=1.001 * affine.scale)), "padded"),
    "scales of other channels": (weighed(1, "scale", lambda scale: scale.roll(1)), "padded"),
    "bias left out": (weighed(3, "bias", torch.zeros_like), "last"),
    "bias of another channel": (weighed(2, "bias", lambda bias: bias.roll(1)), "cut"),
    "bytes of another scale": (
        stepped("layer", lambda step: replace(step, function=partial(step.function, then=Affine(0.1, 100, 8)))),
        "first",
    ),
    "padding with zero": (stepped("constant_pad_nd", argued([1, 2, 0, 1], 0.0)), "constant_pad_nd after first"),
    "padding on the other side": (
        stepped("constant_pad_nd", lambda step: replace(step, args=(step.args[0], [2, 1, 0, 1], step.args[2]))),
        "constant_pad_nd after first",
    ),
    "activation left out": (stepped("hardtanh_1", given(activation="none", limits=())), "cut"),
    "another activation": (stepped("hardtanh_1", given(activation="relu", limits=())), "cut"),
    "other limits": (stepped("hardtanh_1", given(limits=(0.0, 5.9))), "cut"),
    "another step between": (
        stepped("gelu", lambda step: replace(step, function=torch.ops.aten.silu.default)),
        "gelu after cut",
    ),
    "rounding down": (
        stepped("bytes_0", lambda step: replace(step, function=lambda x: step.function(x - 0.01))),
        "bytes_0 after the pixels",
    ),
}


FUSED: dict[str, tuple[Callable[[Both], None], str]] = {
    "pixels padded on the other side": (
        stepped("constant_pad_nd", lambda step: replace(step, args=(step.args[0], [1, 0, 1, 0], step.args[2]))),
        "constant_pad_nd after the pixels",
    ),
    "less padding in a layer": (lambda case: setattr(case.fast.layers[1], "padding", (1, 2)), "deep"),
    "bytes padded with another": (
        stepped("constant_pad_nd_2", argued([0, 1, 0, 1], 1.0)),
        "constant_pad_nd_2 after deep",
    ),
    "bytes that end elsewhere": (
        stepped("hardtanh_2", lambda step: replace(step, function=partial(step.function, then=Affine(0.02, 0, 8)))),
        "wide",
    ),
    "a sum in place of another": (
        stepped("add", lambda step: replace(step, function=torch.ops.aten.sub_.Tensor)),
        "add after narrow",
    ),
    "an activation left out in place": (
        stepped("relu", lambda step: replace(step, function=torch.ops.aten.neg_.default)),
        "relu after again",
    ),
}


def test_paddings_activations_and_sums_cost_no_step_of_their_own() -> None:
    torch.manual_seed(0)
    case = both(Residual())
    assert case.place is None
    before = {str(step.value): step for step in case.program.steps}
    after = {str(step.value): step for step in case.fast.program.steps}
    assert "constant_pad_nd_1" in before.keys() - after.keys()
    assert after["hardtanh_2"].function.keywords["activation"] == "none"  # type: ignore[attr-defined]
    assert {name for name, step in after.items() if str(step.function).endswith("_.Tensor")} == {"mul", "add", "add_1"}
    few = case.pixels[:3]  # a batch that is not full
    got, expected = case.fast.logits(few), case.simulated.logits(few, 3)
    assert torch.allclose(got, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    assert torch.equal(got, case.fast.logits(few)), "what is written in place is read again"


def test_a_sum_of_another_type_is_not_written_in_place() -> None:
    class Wide(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.last((x + torch.ones(1, 1, 7, 7, dtype=torch.float64)).float().mean((2, 3)))

    torch.manual_seed(0)
    assert both(Wide()).place is None


@pytest.mark.parametrize("fault", FUSED)
def test_a_fault_in_what_is_fused_is_named(fault: str) -> None:
    torch.manual_seed(0)
    case = both(Residual())
    inject, place = FUSED[fault]
    inject(case)
    assert case.place == place


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_step_is_named_by_it(fault: str) -> None:
    torch.manual_seed(0)
    case = both(Steps())
    assert case.place is None
    inject, place = FAULTS[fault]
    inject(case)
    assert case.place == place


def test_a_program_that_departs_from_its_network_is_named_by_the_layer_after() -> None:
    torch.manual_seed(0)
    case = both(Steps())
    assert recorded_otherwise(case.prepared, case.program, case.pixels) is None
    for name, place in (("constant_pad_nd", "the input of padded"), ("sub", "the input of last")):
        program = altered(case.program, name, argued(0.5) if name == "sub" else argued([2, 1, 0, 1]))
        assert recorded_otherwise(case.prepared, program, case.pixels) == place
