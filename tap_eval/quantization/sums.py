"""What travels between layers in 8-bit integers, besides what layers read and round for themselves.

Outputs of convolutions do, and what is computed of them while nothing but integers goes in:

- Such a value begins as the output of a convolution, or as an addition of two such values, an average or a
  concatenation of them.
- It is rounded once, after the ReLU, ReLU6 or maximum pooling that alone reads it, and its integers stay what they are
  where numbers are only moved or picked: views, slices, zeros padded, ReLU, maximum pooling.
- Its range is that of the input of the first layer that reads all of it, so that what this layer and an addition read
  are the same bytes; else its own on the calibration images, in full precision.
- What one layer alone reads is rounded by that layer, to its bits. What one concatenation alone reads is rounded with
  the concatenation, by its range.
- An addition, average or concatenation that operators in float alone read stays in float32, and so does all else: the
  outputs of linear layers, LayerNorm, GELU, SiLU, softmax, what these are added to, and what the network gives.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.preparing.program import Program, Step, Value, bind, free, readers_of
from tap_eval.quantization.ranges import Range, RangeRule, Take, by_rule

SumsIn = Literal["int8", "float"]
"""What travels between layers besides their inputs: 8-bit integers where this module says so, or float32."""

AVERAGES = frozenset({"avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "mean"})
_WITH_PLACES = "max_pool2d_with_indices"
"""maximum pooling that gives the maxima and their places"""
CONCATENATIONS = frozenset({"cat", "concat"})
_MOVES_ALL = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
        *("permute", "transpose", "t", "clone", "contiguous", "alias", "detach", "lift_fresh", "roll", "flip"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
    }
)
_MOVES_SOME = frozenset(
    {"slice", "select", "narrow", "index_select", "split", "split_with_sizes", "chunk", "unbind", "getitem"}
)
_LIMITS: dict[str, tuple[float, float]] = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "hardtanh": (-1.0, 1.0),
    "clamp": (-math.inf, math.inf),
    "clamp_min": (-math.inf, math.inf),
}
"""unless a step gives others"""

Readers = Mapping[Value, Sequence[Step]]
"""The steps that read each value."""


@dataclass(frozen=True)
class Carried:
    """A value that travels in integers."""

    value: Value
    """which is rounded as soon as it is computed"""
    layer: int | None
    """the layer whose input has its range, None where its range is its own"""
    alone: bool
    """whether nothing but that layer reads it, which then rounds it for itself"""
    members: tuple[Value, ...]
    """whose numbers are its integers: the value, what it is picked from before it is rounded, and what is picked from
    it"""


@dataclass(frozen=True)
class Sums:
    """What a network needs to round what travels between its layers."""

    ranges: tuple[Range, ...]
    """least and greatest number of each carried value whose range is its own, in the order of `carried`"""
    recorded: Callable[[int], Program]
    """the steps of the network, for so many images a batch"""


@dataclass(frozen=True)
class Ranged:
    """The values between layers that no layer rounds for itself, by whose range they have."""

    own: int = 0
    """how many have one of their own"""
    inputs: tuple[int, ...] = ()
    """of each of the others the layer whose input has the same, by index"""

    def apart(self, layer: int, activation_bits: int) -> int:
        """How many have the range of a layer's input but not its scale, since it has fewer than 8 bits."""
        return self.inputs.count(layer) if activation_bits < 8 else 0

    def scales(self, activations: Sequence[int]) -> int:
        """How many have a scale that no layer's input has, with inputs of so many bits."""
        return self.own + sum(self.apart(layer, bits) for layer, bits in enumerate(activations))


NONE = Ranged()
"""where all that no layer rounds is in float32"""


@dataclass(eq=False)
class _Group:
    """A value and what is picked from it, as one that may travel in integers."""

    source: Step
    """with which it begins"""
    value: Value
    members: list[Value]
    some: set[Value] = field(default_factory=set)
    """members without some of its numbers"""
    readers: list[tuple[Step | None, Value]] = field(default_factory=list)
    """other steps, each with the member that it reads; None for what the network gives"""

    @property
    def layers(self) -> list[int | None]:
        """Of each reader, in order, the layer that it is."""
        return [step.layer if step else None for step, _ in self.readers]


def carried(steps: Sequence[Step], convolutions: Collection[int], result: Value) -> list[Carried]:
    """The values that travel in integers, in the order in which they begin.

    `steps` are ATen operators and calls of layers that compute `result`, none of which writes to what it reads: those
    of `record`, or of a program that torch.export has decomposed. Both give the same values in the same order.
    `convolutions` are the indices of the layers that are convolutions.
    """
    groups, of = _groups(free(steps, result), convolutions, result)
    kept: dict[_Group, _Group] = {}
    """each that travels in integers, with the one that it is rounded with: itself, but for what is concatenated"""
    for group in reversed(groups):
        inside = [of[step.value] for step, _ in group.readers if step and of.get(step.value) in kept]
        is_read = any(layer is not None for layer in group.layers) or inside
        if is_read or (group.source.layer is not None and any(step for step, _ in group.readers)):
            joined = len(inside) == len(group.readers) == 1 and name_of(inside[0].source) in CONCATENATIONS
            kept[group] = kept[inside[0]] if joined else group
    found = []
    for group in groups:
        if kept.get(group) is group:
            alone = len(set(group.layers)) == 1 and group.layers[0] is not None
            whole = [step.layer for step, value in group.readers if step and (alone or value not in group.some)]
            layer = next((layer for layer in whole if layer is not None), None)
            members = [value for other in groups if kept.get(other) is group for value in other.members]
            found.append(Carried(group.value, layer, alone, tuple(members)))
    return found


def _groups(
    steps: Sequence[Step], convolutions: Collection[int], result: Value
) -> tuple[list[_Group], dict[Value, _Group]]:
    """All that may travel in integers, in the order in which they begin, and the one to which a value belongs."""
    readers = readers_of(steps)
    groups: list[_Group] = []
    of: dict[Value, _Group] = {}
    for step in steps:
        if step.value in of:
            continue
        if step.layer in convolutions or _computes(step, of):
            groups.append(_begun(step, readers, result))
            of |= dict.fromkeys(groups[-1].members, groups[-1])
        elif (group := of.get(read_by(step))) and (moves(step) or is_maximum(step, readers) or _is_relu(step)):
            group.members.append(step.value)
            if read_by(step) in group.some or not _moves_all(step):
                group.some.add(step.value)
            of[step.value] = group
    for step in steps:
        for value in step.needs:
            if (group := of.get(value)) and of.get(step.value) is not group:
                group.readers.append((step, value))
    if result in of:
        of[result].readers.append((None, result))
    return groups, of


def _begun(source: Step, readers: Readers, result: Value) -> _Group:
    """What begins with a step, followed through what alone reads it."""
    last = source
    group = _Group(source, source.value, [source.value])
    while last.value is not result and len(readers[last.value]) == 1:
        step = readers[last.value][0]
        picks = is_maximum(step, readers) or limits_of(step) is not None
        if read_by(step) is not last.value or not (picks or moves(step)):
            break
        if picks or name_of(last) == _WITH_PLACES:
            group.value = step.value
        group.members.append(step.value)
        last = step
    return group


def _computes(step: Step, of: Mapping[Value, Any]) -> bool:
    """Whether a step gives numbers of its own that may travel in integers, since what it reads does."""
    if step.kwargs:
        return False
    name = name_of(step)
    if name == "add":
        return len(step.args) == 2 and all(_is_in(value, of) for value in step.args)
    if name in CONCATENATIONS:
        return all(_is_in(value, of) for value in step.args[0])
    return name in AVERAGES and _is_in(step.args[0], of)


def _is_in(value: Any, of: Mapping[Value, Any]) -> bool:
    return isinstance(value, Value) and value in of


def read_by(step: Step) -> Any:
    """The first argument of a step."""
    return step.args[0] if step.args and isinstance(step.args[0], Value) else None


def name_of(step: Step) -> str:
    """The name of a step's function, as "add", without an overload; "" for a layer."""
    if step.layer is not None:
        return ""
    if step.function is operator.getitem:
        return "getitem"
    if isinstance(step.function, torch._ops.OpOverload) and step.function.namespace == "aten":
        return step.function.overloadpacket.__name__
    return ""


def limits_of(step: Step) -> tuple[float, float] | None:
    """The least and the greatest number that a step leaves, where it does nothing but cut those beyond."""
    usual = _LIMITS.get(name_of(step))
    if usual is None or step.kwargs:
        return None
    given = [*step.args[1:], *usual[len(step.args) - 1 :]]
    low, high = (limit if each is None else each for each, limit in zip(given, (-math.inf, math.inf), strict=True))
    return (float(low), float(high)) if isinstance(low, int | float) and isinstance(high, int | float) else None


def pads_with_zeros(step: Step) -> bool:
    """Whether a step adds zeros at the edges, or takes numbers away there."""
    given = step.args[2:]
    if name_of(step) == "pad" and given:
        given = given[1:] if given[0] == "constant" else given
    return name_of(step) in ("constant_pad_nd", "pad") and not any(given) and not step.kwargs


def moves(step: Step) -> bool:
    """Whether a step gives numbers that it reads, in any order, and zeros."""
    return name_of(step) in _MOVES_ALL | _MOVES_SOME or pads_with_zeros(step)


def _moves_all(step: Step) -> bool:
    return name_of(step) in _MOVES_ALL or (pads_with_zeros(step) and min(step.args[1]) >= 0)


def _is_relu(step: Step) -> bool:
    """Whether it leaves integers integers: zero is one, and other limits need be none."""
    return limits_of(step) == (0.0, math.inf)


def is_maximum(step: Step, readers: Readers) -> bool:
    """Whether it is maximum pooling, of which nothing but the maxima is read."""
    if name_of(step) == _WITH_PLACES:
        reading = readers.get(step.value, ())
        return len(reading) == 1 and name_of(reading[0]) == "getitem" and reading[0].args[1] == 0
    return name_of(step) == "max_pool2d"


def carried_by(program: Program, modules: Sequence[Quantizable]) -> list[Carried]:
    """The values that travel in integers between these layers, as `carried` has them."""
    return carried(program.steps, convolutions(modules), program.logits)


def ranged(program: Program | None, prepared: Prepared) -> Ranged:
    """The values that a network rounds between its layers: of its program, if it has one, and operands of attention."""
    found = [each.layer for each in carried_by(program, prepared.modules) if not each.alone] if program else []
    layers = tuple(layer for layer in found if layer is not None)
    return Ranged(len(found) - len(layers) + len(prepared.operands), layers)


def calibrated(recorded: Callable[[int], Program], prepared: Prepared, pixels: Tensor, rule: RangeRule) -> Sums:
    """What a network needs to round what travels between its layers, by calibration images (N, C, H, W)."""

    def found() -> tuple[Range, ...]:
        program = recorded(prepared.batch)  # which is run with, whatever ranges are chosen in
        return ranges(program if rule == "minmax" else recorded(1), prepared.modules, pixels, rule)

    return Sums(prepared.fitting(found), recorded)


@torch.inference_mode()
def ranges(
    program: Program, modules: Sequence[Quantizable], pixels: Tensor, rule: RangeRule = "minmax"
) -> tuple[Range, ...]:
    """See `Sums.ranges`, of a network with these layers on images (N, C, H, W), chosen by `rule`.

    By any other rule than `minmax` the program has to be one of single images.
    """
    own = [each.value for each in carried_by(program, modules) if each.layer is None]
    bound = bind(program, modules)

    def run(part: Tensor, take: Take[Value]) -> None:
        known = program.begin(program.padded(part))
        for step in bound.steps:
            step.run(known)
            if step.value in found:
                take(step.value, known[step.value])

    found = dict.fromkeys(own, (math.inf, -math.inf))
    if rule != "minmax":
        sizes = {value: math.prod(value.meta["val"].shape) * len(pixels) for value in own}
        chosen = by_rule(rule, run, pixels.split(program.batch), sizes, (8,))
        return tuple(chosen[value][8] for value in own)

    def widen(value: Value, x: Tensor) -> None:
        low, high = (float(each) for each in torch.aminmax(x))
        found[value] = min(low, found[value][0]), max(high, found[value][1])

    for part in pixels.split(program.batch):
        run(part, widen)
    return tuple(found.values())


def convolutions(modules: Sequence[Quantizable]) -> frozenset[int]:
    """The indices of those that are convolutions."""
    return frozenset(index for index, module in enumerate(modules) if isinstance(module, torch.nn.Conv2d))
