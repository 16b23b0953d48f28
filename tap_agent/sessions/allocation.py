"""An allocation file as it is read: bits, and what of its figures can be held against the network at hand."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tap_agent.runs.result import MeasuredTop1
from tap_eval.export.header import BetweenRecord
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BitsMistake, Mistake
from tap_eval.quantization import quantizer
from tap_eval.quantization.quantizer import Allocation, distinct

LEAST, MOST = 2, 8
"""bits that a weight or an activation may have"""
_SHOWN = 8
"""digits of a digest"""


class AllocationMistake(Mistake):
    """An allocation file that is none, or that is another network's."""

    kind = "proxy"


class AllocatedLayer(BaseModel):
    """A layer; what is None was not told by files of before."""

    name: str
    params: int
    weight_bits: int | tuple[int, ...]
    activation_bits: int
    kind: str = ""
    shape: tuple[int, ...] | None = None
    input_scale: float | None = None
    input_zero_point: int | None = None
    weight_scales: tuple[float, ...] | None = None

    @property
    def out_channels(self) -> int:
        """Rows of its weight, 0 where they are not known."""
        if self.shape:
            return self.shape[0]
        return 0 if isinstance(self.weight_bits, int) else len(self.weight_bits)

    @property
    def bits(self) -> set[int]:
        """Of its weights."""
        return distinct(self.weight_bits)


class AllocatedBetween(BetweenRecord):
    """A value between layers that is rounded to 8 bits."""

    scale: float
    zero_point: int


class AllocatedOperand(BaseModel):
    """An operand of a product of two activations that is in 8 bits."""

    name: str
    scale: float
    zero_point: int


class _Split(BaseModel):
    count: int
    digest: str


class _Images(BaseModel):
    calibration: _Split
    test: _Split


class _Tensor(BaseModel):
    name: str
    bytes: int


class _InFloat(BaseModel):
    tensors: tuple[_Tensor, ...] = ()


class AllocatedNetwork(BaseModel):
    """The bits of one network; of what else there is, what was not told by files of before is None."""

    model_config = ConfigDict(extra="allow")  # to be shown
    network: str
    layers: tuple[AllocatedLayer, ...]
    between: tuple[AllocatedBetween, ...] = ()
    operands: tuple[AllocatedOperand, ...] = ()
    test: MeasuredTop1 | None = None
    weights_digest: str | None = None
    images: _Images | None = None
    measured_on: dict[str, str] | None = None
    size_parts: dict[str, int] = {}
    in_float32: _InFloat = _InFloat()

    def differences(self, origin: str, bench: Bench, allocation: Allocation) -> Iterator[str]:
        """What is not as it was when the figures in the file `origin` were measured, a sentence each."""
        name, digest = bench.name, bench.weights_digest
        if self.weights_digest not in (None, digest):
            yield (
                f"{name} at hand has other weights ({digest[:_SHOWN]}) than those that {origin} was written of "
                f"({str(self.weights_digest)[:_SHOWN]}): its bits are taken, and its figures are another network's"
            )
        if self.images and self.images.calibration.digest != bench.splits.calibrations[0].digest:
            yield f"{name}: the calibration images are not those of {origin}, and weights are rounded by them"
        if self.images and self.images.test.digest != bench.splits.test.digest:
            yield f"{name}: the test images are not those of {origin}"
        here = bench.measured_on(allocation)
        if self.measured_on not in (None, here):
            was = self.measured_on or {}
            yield (
                f"{name} was measured on the {was.get('path')} path on {was.get('device')}, and is here on the "
                f"{here['path']} path on {here['device']}: single images may come out otherwise"
            )

    def confirmed(self, origin: str, correct: int, count: int) -> str:
        """What the file says of the test images beside what was found just now; "" where it says nothing of so many."""
        if self.test is None or self.test.count != count:
            return ""
        if self.test.correct == correct:
            return f"{self.network}: {correct:,} of {count:,} test images are right, as {origin} says"
        return (
            f"{self.network}: {correct:,} of {count:,} test images are right, and {origin} says {self.test.correct:,}"
        )


class AllocationFile(BaseModel):
    """A whole file."""

    networks: tuple[AllocatedNetwork, ...]
    settings: dict[str, Any] | None = None
    """with which its figures were measured, as a config has them"""
    provenance: dict[str, Any] = {}

    def aged(self, origin: str) -> Iterator[str]:
        """A sentence where another quantizer wrote the file."""
        was = (self.provenance.get("versions") or {}).get("quantizer", quantizer.VERSION)
        if was != quantizer.VERSION:
            yield (
                f"version {was} of the quantizer wrote {origin}, this is {quantizer.VERSION}: the same bits may give "
                "other integers"
            )


def read_allocation(path: Path, text: str) -> AllocationFile:
    """What the file at `path` holds; raises `AllocationMistake`, and `BitsMistake` at the first that cannot be."""
    try:
        found = AllocationFile.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise AllocationMistake(
            f"{path} is no allocation file ({place and f'{place}: '}{problem['msg']}): give a run's best.json, or what "
            "`tap-agent apply --out FILE` wrote."
        ) from error
    for layer in (layer for network in found.networks for layer in network.layers):
        if wrong := sorted(bits for bits in layer.bits | {layer.activation_bits} if not LEAST <= bits <= MOST):
            raise BitsMistake(
                f"{path} gives layer {layer.name} {listed(wrong)} bits: whole numbers from {LEAST} to {MOST} can be "
                "measured, so mend the file, or write it anew with `tap-agent apply --out FILE`."
            )
    return found


def listed(bits: Collection[int]) -> str:
    """In words."""
    return " and ".join(map(str, bits))
