"""A network's program, rewritten for layers that read bytes.

Activations travel between layers as bytes where nothing else reads them, and where `sums` says
so: these are moved, added, pooled and joined as bytes. ReLU and ReLU6 are done by the layer
before them, or by its bytes where these end at the same numbers; zeros are padded by the layer
that reads them, or else as bytes. Whatever else the network computes stays in float32, in place
of what it reads where nothing else does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tap_eval.preparing.products import Quantizable
from tap_eval.preparing.program import Program, Step, Value, free, readers_of
from tap_eval.quantization.kernels import added, averaged, bytes_of, converted, floats_of, joined, largest, padded
from tap_eval.quantization.quantizer import Affine
from tap_eval.quantization.sums import (
    AVERAGES,
    CONCATENATIONS,
    Carried,
    is_maximum,
    limits_of,
    name_of,
    pads_with_zeros,
)

_ATEN = torch.ops.aten
_ROUNDED = 0.25
"""so near, in parts of a byte, is what certainly becomes that byte"""
_NO_ACTIVATION: tuple[str, tuple[float, ...]] = ("none", ())
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    _ATEN.add.Tensor: _ATEN.add_.Tensor,
    _ATEN.mul.Tensor: _ATEN.mul_.Tensor,
    _ATEN.silu.default: _ATEN.silu_.default,
    _ATEN.sigmoid.default: _ATEN.sigmoid_.default,
    _ATEN.hardswish.default: _ATEN.hardswish_.default,
    _ATEN.hardsigmoid.default: _ATEN.hardsigmoid_.default,
    _ATEN.relu.default: _ATEN.relu_.default,
    _ATEN.hardtanh.default: _ATEN.hardtanh_.default,
}

Bytes = dict[Value, tuple[Value, Affine | None]]
"""Of values that are bytes, the value that they stand for, and as which integers; it may bear the same name.

So too of values that are float32 made of bytes, which are no integers.
"""


def with_padding_in_layers(
    program: Program, modules: Sequence[Quantizable]
) -> tuple[Program, dict[int, tuple[int, int]]]:
    """The program without the zeros that convolutions can pad by themselves, and what these then pad, by their index.

    They pad as many on both sides, in every call alike.
    """
    padded = {step.value: step for step in program.steps if pads_with_zeros(step)}
    found: dict[int, set[tuple[int, int] | None]] = {}
    for step in program.steps:
        if step.layer is not None:
            found.setdefault(step.layer, set()).add(_padding(padded.get(step.args[0]), modules[step.layer]))
    paddings = {layer: next(iter(each)) for layer, each in found.items() if len(each) == 1}
    folded = {layer: padding for layer, padding in paddings.items() if padding is not None}
    steps = [
        replace(step, args=padded[step.args[0]].args[:1]) if step.layer in folded else step for step in program.steps
    ]
    return replace(program, steps=free(steps, program.logits)), folded


def _padding(step: Step | None, module: Quantizable) -> tuple[int, int] | None:
    """What `module` has to pad so that it needs no `step` before it."""
    if step is None or not isinstance(module, nn.Conv2d):
        return None
    left, right, top, bottom, *others = (int(each) for each in (*step.args[1], 0, 0))
    if left != right or top != bottom or min(left, top) < 0 or any(others):
        return None
    rows, columns = (int(each) for each in module.padding)
    return rows + top, columns + left


@dataclass
class _Rewriting:
    """Steps as they are written, and what is known of their values."""

    readers: Mapping[Value, Sequence[Step]]
    makers: Mapping[Value, Step]
    affines: Sequence[Affine]
    forms: Mapping[Value, Affine]
    """integers of the values that are bytes and nothing else"""
    steps: list[Step] = field(default_factory=list)
    known: dict[tuple[Value, Affine | None], Value] = field(default_factory=dict)
    """bytes of values, and float32 of those that are bytes"""
    fresh: set[Value] = field(default_factory=set)
    """values in float32 with memory of their own"""
    absorbed: set[Value] = field(default_factory=set)
    """computed by steps before them"""
    names: fx.Graph = field(default_factory=fx.Graph)

    def only(self, value: Value) -> Step | None:
        """The step that alone reads `value`."""
        readers = self.readers.get(value, ())
        return readers[0] if len(readers) == 1 else None

    def read_as(self, value: Value) -> Affine | None:
        """The one form in which a value is read, padded or not, if layers alone read it."""
        forms = {
            self.affines[step.layer] if step.layer is not None else self._read_padded(step)
            for step in self.readers.get(value, ())
        }
        return forms.pop() if len(forms) == 1 else None

    def _read_padded(self, step: Step) -> Affine | None:
        return self.read_as(step.value) if pads_with_zeros(step) else None

    def bytes_of(self, value: Value, affine: Affine) -> Value:
        """The bytes of a value, computed now if they are not there: what is padded with zeros, before it is padded."""
        if (value, affine) not in self.known:
            maker, form = self.makers.get(value), self.forms.get(value)
            if form:
                self._make(value, affine, partial(converted, of=form, to=affine), self.known[value, form])
            elif maker is not None and pads_with_zeros(maker):
                x = self.bytes_of(maker.args[0], affine)
                name = value if self.read_as(value) else None
                self._make(value, affine, padded, x, maker.args[1], float(affine.zero_point), name=name)
            else:
                self._make(value, affine, partial(bytes_of, affine=affine), value)
        return self.known[value, affine]

    def floats_of(self, value: Value) -> Value:
        """A value in float32, computed now if it is bytes alone."""
        form = self.forms.get(value)
        if form is None:
            return value
        if (value, None) not in self.known:
            self._make(value, None, partial(floats_of, affine=form), self.known[value, form])
        return self.known[value, None]

    def _make(
        self, value: Value, form: Affine | None, function: Callable[..., Any], *args: Any, name: Value | None = None
    ) -> None:
        """Writes the step that gives a value in another form; it is called by a new name unless it is given one."""
        name = name or self.names.placeholder(f"{'bytes' if form else 'floats'}_{len(self.known)}")
        self.steps.append(Step(name, function, args, {}))
        self.known[value, form] = name

    def in_float(self, step: Step) -> None:
        """Writes a step that reads and gives float32."""
        step = self._in_place(step)
        args, kwargs = fx.node.map_arg((step.args, step.kwargs), self.floats_of)
        self.steps.append(replace(step, args=args, kwargs=kwargs))

    def _in_place(self, step: Step) -> Step:
        """The step, written over what it alone reads."""
        if step.function not in _IN_PLACE or step.kwargs:
            return step
        place = next((place for place, value in enumerate(step.args) if self._ends(value, step)), None)
        if place is None:
            return step
        self.fresh.add(step.value)
        others = (*step.args[:place], *step.args[place + 1 :])
        return replace(step, function=_IN_PLACE[step.function], args=(step.args[place], *others))

    def _ends(self, value: Any, step: Step) -> bool:
        """Whether the memory of `value` is of no use after `step`, and fits what it gives."""
        if value in self.forms:  # what is made of its bytes for those that read float32
            readers = [each for each in self.readers[value] if each.layer is None and each.value not in self.forms]
            ends = len(readers) == 1
        else:
            ends = value in self.fresh and self.only(value) is step
        return ends and _kind(value) == _kind(step.value)

    def in_layer(self, step: Step, layer: Callable[..., Tensor], affine: Affine) -> None:
        """Writes a layer's call, with the activation that alone reads it."""
        x, value = self.bytes_of(step.args[0], affine), step.value
        activation, limits = _NO_ACTIVATION
        after = self.only(value)
        if after is not None and (found := activation_of(after)):
            activation, limits = found
            value = after.value
            self.absorbed.add(value)
        then = self.forms.get(value) or self.read_as(value)
        then = then if then and then.bits == 8 else None
        if then:
            self.known[value, then] = value
            activation, limits = _NO_ACTIVATION if ends_in(then, activation, limits) else (activation, limits)
        else:
            self.fresh.add(value)
        function = partial(layer, then=then, activation=activation, limits=limits)
        self.steps.append(replace(step, value=value, function=function, args=(x,)))

    def in_bytes(self, step: Step) -> None:
        """Writes a step that reads and gives bytes."""
        to, value, name = self.forms[step.value], step.value, name_of(step)
        first, *others = step.args
        read = list(first) if name in CONCATENATIONS else [each for each in step.args if isinstance(each, Value)]
        of = [self.forms[each] for each in read]
        parts = [self.known[each, form] for each, form in zip(read, of, strict=True)]
        function, args, kwargs = step.function, (parts[0], *others), step.kwargs
        if pads_with_zeros(step):
            function, args = padded, (parts[0], others[0], float(to.zero_point))
        elif is_maximum(step, self.readers):
            function = largest
            if (after := self.only(value)) and name_of(after) == "getitem":  # the maxima, without their places
                value = after.value
                self.absorbed.add(value)
        elif limits := limits_of(step):
            function, args = torch.clamp, (parts[0], *_bytes_at(limits, to))
        elif name == "add":
            value = self._cut_by(value, to)
            function, args = partial(added, of=of[0], of_other=of[1], to=to), tuple(parts)
        elif name in CONCATENATIONS:
            function, args = partial(joined, of=of, to=to), (parts, *others)
        elif name in AVERAGES:
            value = self._cut_by(value, to)
            function = partial(averaged, function=step.function, of=of[0], to=to)
        self.known[value, to] = value
        self.steps.append(replace(step, value=value, function=function, args=args, kwargs=kwargs))

    def _cut_by(self, value: Value, affine: Affine) -> Value:
        """What a value is after the activation that alone reads it, if the bytes of `affine` end where that does."""
        after = self.only(value)
        if after is None or after.value not in self.forms or not (found := activation_of(after)):
            return value
        if not ends_in(affine, *found):
            return value
        self.absorbed.add(after.value)
        return after.value


def in_bytes(
    program: Program,
    layers: Sequence[Callable[..., Tensor]],
    affines: Sequence[Affine],
    sums: Sequence[tuple[Carried, Affine]] = (),
) -> tuple[Program, Bytes]:
    """The program with `layers`, which read bytes of `affines`, as the module's first lines say, and what is bytes.

    A layer is called with bytes and the keywords `then`, `activation` and `limits`. `sums` are the values that are
    bytes besides, each with its integers.
    """
    forms = {
        value: affine
        for each, affine in sums
        if not each.alone or affine == affines[each.layer or 0]
        for value in each.members
    }
    makers = {step.value: step for step in program.steps}
    new = _Rewriting(readers_of(program.steps), makers, affines, forms)
    for step in program.steps:
        if step.value in new.absorbed:
            continue
        if step.layer is not None:
            new.in_layer(step, layers[step.layer], affines[step.layer])
        elif step.value in forms:
            new.in_bytes(step)
        elif not (pads_with_zeros(step) and new.read_as(step.value)):  # else bytes are padded
            new.in_float(step)
    logits = new.floats_of(program.logits)
    stands_for = {value: key for key, value in new.known.items()}
    return replace(program, steps=free(new.steps, logits), logits=logits), stands_for


def activation_of(step: Step) -> tuple[str, tuple[float, ...]] | None:
    """What oneDNN calls the activation that a step computes."""
    limits = limits_of(step)
    if limits == (0.0, math.inf):
        return "relu", ()
    return ("hardtanh", limits) if limits and all(map(math.isfinite, limits)) else None


def ends_in(affine: Affine, activation: str, limits: Sequence[float]) -> bool:
    """Whether the least and the largest byte are those of the least and the largest number after `activation`."""
    low, high = {"relu": (0.0, torch.inf), "hardtanh": tuple(limits)}.get(activation, (-torch.inf, torch.inf))
    least, largest = (limit / affine.scale + affine.zero_point for limit in (low, high))
    return least <= _ROUNDED and largest >= 2**affine.bits - 1 - _ROUNDED


def _bytes_at(limits: tuple[float, float], affine: Affine) -> tuple[int, int]:
    """The bytes of the least and the greatest number that are left."""
    top = 2**affine.bits - 1
    low, high = (min(max(limit / affine.scale + affine.zero_point, 0), top) for limit in limits)
    return round(low), round(high)


def _kind(value: Value) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and type of a recorded tensor."""
    found = value.meta.get("val")
    return (found.shape, found.dtype) if isinstance(found, Tensor) else None
