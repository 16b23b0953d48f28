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
