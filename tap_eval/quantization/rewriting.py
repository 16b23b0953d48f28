"""A network's program, rewritten for layers that read bytes.

Activations travel between layers as bytes where nothing else reads them. ReLU and ReLU6 are
done by the layer before them, or by its bytes where these end at the same numbers; zeros are
padded by the layer that reads them, or else as bytes. Whatever else the network computes stays
in float32, in place of what it reads where nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tap_eval.preparing.products import Quantizable
from tap_eval.preparing.program import Program, Step, Value, free, readers_of
from tap_eval.quantization.quantizer import Affine

_ATEN = torch.ops.aten
_MAGIC = 1.5 * 2**23
"""a float32 of this size has its whole number in the low bits, rounded half to even"""
_ROUNDED = 0.25
"""so near, in parts of a byte, is what certainly becomes that byte"""
_NO_ACTIVATION: tuple[str, tuple[float, ...]] = ("none", ())
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    _ATEN.add.Tensor: _ATEN.add_.Tensor,
    _ATEN.relu.default: _ATEN.relu_.default,
    _ATEN.hardtanh.default: _ATEN.hardtanh_.default,
}

Bytes = dict[Value, tuple[Value, Affine]]
"""Of values that are bytes, the value that they stand for, and as which integers; it may bear the same name."""


def bytes_of(x: Tensor, affine: Affine) -> Tensor:
    """`x` float32 as integers of `affine`, uint8, with channels last."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    real = torch.mul(x, 1 / affine.scale, out=torch.empty_like(x, memory_format=layout))
    if affine.zero_point:
        real.add_(affine.zero_point)
    whole = real.add_(_MAGIC).clamp_(_MAGIC, _MAGIC + 2**affine.bits - 1)
    return whole.view(torch.int32).to(torch.uint8)  # the low byte; from float it takes five times as long


def with_padding_in_layers(
    program: Program, modules: Sequence[Quantizable]
) -> tuple[Program, dict[int, tuple[int, int]]]:
    """The program without the zeros that convolutions can pad by themselves, and what these then pad, by their index.

    They pad as many on both sides, in every call alike.
    """
    padded = {step.value: step for step in program.steps if _pads_with_zeros(step)}
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
    steps: list[Step] = field(default_factory=list)
    known: dict[tuple[Value, Affine], Value] = field(default_factory=dict)
    """bytes of values"""
    fresh: set[Value] = field(default_factory=set)
    """values in float32 with memory of their own"""
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
        return self.read_as(step.value) if _pads_with_zeros(step) else None

    def bytes_of(self, value: Value, affine: Affine) -> Value:
        """The bytes of a value, computed now if they are not there: what is padded with zeros, before it is padded."""
        if (value, affine) not in self.known:
            maker = self.makers.get(value)
            if maker is not None and _pads_with_zeros(maker):
                x = self.bytes_of(maker.args[0], affine)
                name = value if self.read_as(value) else self.names.placeholder(f"bytes_{len(self.known)}")
                self.steps.append(Step(name, maker.function, (x, maker.args[1], float(affine.zero_point)), {}))
            else:
                name = self.names.placeholder(f"bytes_{len(self.known)}")
                self.steps.append(Step(name, partial(bytes_of, affine=affine), (value,), {}))
            self.known[value, affine] = name
        return self.known[value, affine]

    def in_place(self, step: Step) -> Step:
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
        return value in self.fresh and self.only(value) is step and _kind(value) == _kind(step.value)


def in_bytes(
    program: Program, layers: Sequence[Callable[..., Tensor]], affines: Sequence[Affine]
) -> tuple[Program, Bytes]:
    """The program with `layers`, which read bytes of `affines`, as the module's first lines say, and what is bytes.

    A layer is called with bytes and the keywords `then`, `activation` and `limits`.
    """
    makers = {step.value: step for step in program.steps}
    new, absorbed = _Rewriting(readers_of(program.steps), makers, affines), set[Value]()
    for step in program.steps:
        if step.value in absorbed:
            continue
        if step.layer is None:
            if not (_pads_with_zeros(step) and new.read_as(step.value)):  # else bytes are padded
                new.steps.append(new.in_place(step))
            continue
        x, value = new.bytes_of(step.args[0], affines[step.layer]), step.value
        activation, limits = _NO_ACTIVATION
        after = new.only(value)
        if after is not None and (found := _activation(after)):
            activation, limits = found
            value = after.value
            absorbed.add(value)
        then = new.read_as(value)
        then = then if then and then.bits == 8 else None
        if then:
            new.known[value, then] = value
            activation, limits = _NO_ACTIVATION if _ends_in(then, activation, limits) else (activation, limits)
        else:
            new.fresh.add(value)
        function = partial(layers[step.layer], then=then, activation=activation, limits=limits)
        new.steps.append(replace(step, value=value, function=function, args=(x,)))
    stands_for = {value: key for key, value in new.known.items()}
    return replace(program, steps=free(new.steps, program.logits)), stands_for


def _activation(step: Step) -> tuple[str, tuple[float, ...]] | None:
    """What oneDNN calls the activation that a step computes."""
    if step.function is _ATEN.relu.default:
        return "relu", ()
    if step.function is _ATEN.hardtanh.default:
        given = step.args[1:]  # without those that are the defaults
        return "hardtanh", tuple(float(limit) for limit in (*given, *(-1.0, 1.0)[len(given) :]))
    return None


def _ends_in(affine: Affine, activation: str, limits: Sequence[float]) -> bool:
    """Whether the least and the largest byte are those of the least and the largest number after `activation`."""
    low, high = {"relu": (0.0, torch.inf), "hardtanh": tuple(limits)}.get(activation, (-torch.inf, torch.inf))
    least, largest = (limit / affine.scale + affine.zero_point for limit in (low, high))
    return least <= _ROUNDED and largest >= 2**affine.bits - 1 - _ROUNDED


def _pads_with_zeros(step: Step) -> bool:
    return step.function is _ATEN.constant_pad_nd.default and not any(step.args[2:])


def _kind(value: Value) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and type of a recorded tensor."""
    found = value.meta.get("val")
    return (found.shape, found.dtype) if isinstance(found, Tensor) else None
