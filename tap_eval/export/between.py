"""What travels in integers between layers, in words that need no knowledge of how it was found.

A value is called after the layer that was last called before it: `NAME.output` is what a layer gives, and `NAME.add`,
`NAME.mean` or `NAME.cat` is what is computed of several such values, or of one. These are names of PyTorch's operators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tap_eval.export.graph import labels_of
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.program import Program, Step, Value, readers_of
from tap_eval.quantization.quantizer import Affine, QuantizedNetwork
from tap_eval.quantization.sums import (
    AVERAGES,
    CONCATENATIONS,
    Carried,
    Readers,
    is_maximum,
    limits_of,
    name_of,
    read_by,
)


@dataclass(frozen=True)
class Between:
    """A value that is rounded to 8 bits as soon as it is computed, by no layer that reads it."""

    name: str
    operation: str
    """that gives it: output, of a layer, or the operator"""
    of: tuple[str, ...]
    """the values that the operator reads; none of a layer's"""
    then: tuple[str, ...]
    """what is done to it before it is rounded, as relu, clamp(0, 6) or max_pool2d"""
    layer: int | None
    """the layer whose input has its range, None where its range is its own"""
    affine: Affine


def between(network: QuantizedNetwork) -> list[Between] | None:
    """Those of a network, in the order in which they begin; None where all of it travels in float32."""
    if network.sums is None:
        return None
    program = network.sums.recorded(network.prepared.batch)
    found = [pair for pair in network.carried(program.steps, program.logits) if not pair[0].alone]
    words = _Words(program, network.prepared)
    return [words.told(each, affine) for each, affine in found]


class _Words:
    """Names of values."""

    def __init__(self, program: Program, prepared: Prepared) -> None:
        self.makers: Mapping[Value, Step] = {step.value: step for step in program.steps}
        self.readers: Readers = readers_of(program.steps)
        self.labels = labels_of(program, prepared)
        self.names: dict[Value, str] = {}
        """of the values with which what travels begins"""
        self.last: dict[Value, int] = {}
        """the call of the layer that was last called before each"""

    def told(self, carried: Carried, affine: Affine) -> Between:
        source, then = self._source(carried.value)
        of = () if source.layer is not None else tuple(self._name(self._source(value)[0]) for value in _read(source))
        return Between(self._name(source), _operation(source), of, then, carried.layer, affine)

    def _source(self, value: Value) -> tuple[Step, tuple[str, ...]]:
        """The step with which a value begins, and what is done to it from there on."""
        done: list[str] = []
        step = self.makers[value]
        while step.layer is None and not _computes(step):
            if limits := limits_of(step):
                low, high = limits
                done.append("relu" if limits == (0, math.inf) else f"clamp({low:g}, {high:g})")
            elif is_maximum(step, self.readers):
                done.append("max_pool2d")
            step = self.makers[read_by(step)]
        return step, tuple(reversed(done))

    def _name(self, source: Step) -> str:
        if source.value not in self.names:
            if source.call is not None:
                self.last[source.value] = source.call
            else:
                parts = [self._source(value)[0] for value in _read(source)]
                for part in parts:
                    self._name(part)
                self.last[source.value] = max(self.last[part.value] for part in parts)
            name = f"{self.labels[self.last[source.value]]}.{_operation(source)}"
            same = sum(other == name or other.startswith(f"{name}:") for other in self.names.values())
            self.names[source.value] = f"{name}:{same}" if same else name
        return self.names[source.value]


def _computes(step: Step) -> bool:
    """Whether a step that is no layer gives numbers of its own."""
    return name_of(step) == "add" or name_of(step) in CONCATENATIONS | AVERAGES


def _operation(step: Step) -> str:
    return "output" if step.layer is not None else name_of(step).strip("_")


def _read(step: Step) -> Sequence[Value]:
    """The values that a step computes with."""
    return step.args[0] if name_of(step) in CONCATENATIONS else [each for each in step.args if isinstance(each, Value)]
