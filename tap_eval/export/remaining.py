"""What is in float32 in a file of a quantized network, told to whoever writes it, or refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from tap_eval.export.graph import recorded
from tap_eval.mistake import ExportMistake
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.program import Step, Value, readers_of
from tap_eval.quantization.quantizer import QuantizedNetwork
from tap_eval.quantization.sums import Readers, carried, convolutions, is_maximum, limits_of, moves, name_of, read_by

_NAMED = 6


@dataclass(frozen=True)
class Remaining:
    """What is not in integers."""

    tensors: Mapping[str, tuple[int, str]]
    """that no layer holds: bytes, and what reads them, by name"""
    between: Mapping[str, int]
    """what is computed between layers, by operator, and how often"""
    summed: int = 0
    """how much of that sums in integers would have in 8 bits"""
    layers: tuple[str, ...] = ()
    """whose products a runtime multiplies in float32 all the same, by name"""
    runtime: str = ""
    """with its version"""
    why: str = ""
    """it is not known what is computed between layers"""

    def sentences(self) -> list[str]:
        """For people: nothing where all is in integers."""
        found = []
        if self.tensors:
            ordered = sorted(self.tensors.items(), key=lambda item: -item[1][0])
            each = [f"{name} ({size:,} bytes, {reader})" for name, (size, reader) in ordered]
            found.append(f"kept in float32: {_listed(each)}")
        if self.layers:
            found.append(f"multiplied in float32 by {self.runtime}: {_listed(self.layers)}")
        if self.between:
            each = [f"{count} {name}" for name, count in self.between.items()]
            hint = f", of which --sums int8 has {self.summed} in 8 bits" if self.summed else ""
            found.append(f"computed in float32 between layers: {_listed(each)}{hint}")
        if self.why:
            found.append(f"computed in float32 between layers is all that there is, since {self.why}")
        return found

    def refuse(self, name: str) -> None:
        """Raises `ExportMistake` where anything is in float32."""
        if said := self.sentences():
            raise ExportMistake(
                f"{name} would not be all in integers, which strict asks for ({'; '.join(said)}): write it without."
            )

    def multiplied(self, layers: Sequence[str], runtime: str) -> Remaining:
        """With layers that a runtime multiplies in float32."""
        return replace(self, layers=tuple(layers), runtime=runtime)


def remaining(network: QuantizedNetwork) -> Remaining:
    """What is in float32 of a network that has its bits, whatever runs it."""
    return remaining_of(network.prepared, sums=network.sums is not None)


def remaining_of(prepared: Prepared, *, sums: bool) -> Remaining:
    """The same of any bits, with or without `sums` in integers."""
    tensors = {rest.name: (4 * rest.count, rest.reason) for rest in prepared.rest if rest.used}
    try:
        program = recorded(prepared, prepared.watched[0][:1])
    except ExportMistake as mistake:
        return Remaining(tensors, {}, why=str(mistake).partition(": give")[0])
    readers = readers_of(program.steps)
    found = carried(program.steps, convolutions(prepared.modules), program.logits)
    inside = {value for each in found for value in each.members}
    operands = _operands(program.steps)
    computed = [step for step in program.steps if _computes(step, readers) and not _multiplies(step, operands)]
    steps = [step for step in computed if not sums or step.value not in inside]
    summed = sum(step.value in inside for step in steps)
    return Remaining(tensors, dict(Counter(_named(step) for step in steps)), summed)


def _computes(step: Step, readers: Readers) -> bool:
    """Whether a step is no layer and gives numbers of its own, beside those that it cuts off, moves or picks."""
    picks = moves(step) or limits_of(step) is not None or is_maximum(step, readers) or name_of(step) == "getitem"
    return step.layer is None and bool(step.needs) and not picks


def _operands(steps: Sequence[Step]) -> set[Value]:
    """What is made of operands of products of two activations that are in integers, as they are and moved."""
    found: set[Value] = set()
    for step in steps:
        if step.operand is not None or (moves(step) and read_by(step) in found):
            found.add(step.value)
    return found


def _multiplies(step: Step, operands: AbstractSet[Value]) -> bool:
    """Whether it is an operand, or a product of two."""
    return step.operand is not None or (name_of(step) in ("mm", "bmm") and operands >= set(step.needs))


def _named(step: Step) -> str:
    return name_of(step).strip("_") or str(step.function)


def _listed(each: Sequence[str]) -> str:
    more = f" and {len(each) - _NAMED} more" if len(each) > _NAMED else ""
    return ", ".join(each[:_NAMED]) + more
