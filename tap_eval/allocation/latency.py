"""How long layers take on the device that a network is for, as measured there: what a budget in time is about."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, DecimalException
from pathlib import Path

from tap_eval.mistake import BudgetMistake
from tap_eval.preparing.layers import Layer
from tap_eval.quantization.quantizer import Allocation, LayerBits
from tap_eval.sealed import digest

COLUMNS = ("layer", "weight_bits", "activation_bits", "ms")
_FORM = f"a CSV file with the columns {', '.join(COLUMNS)}"
_BYTES = 2**24
"""of a file at most: some hundred thousand rows"""
_MOST = 10**6
"""ms of a layer at most"""
PICOSECONDS = 10**9
"""of a ms"""


@dataclass(frozen=True)
class Latencies:
    """Of layers by their names, at weight and activation bits, in picoseconds.

    They are so short that it is next to nothing what is lost where each output channel has a whole number of them.
    """

    source: str
    """the file"""
    content: str
    """its digest"""
    table: Mapping[tuple[str, int, int], int] = field(repr=False, compare=False)

    @staticmethod
    def read(path: Path) -> Latencies:
        """Of a CSV file whose rows are a layer's name, its weight and activation bits, and ms an image.

        Raises `BudgetMistake`.
        """
        try:
            if path.stat().st_size > _BYTES:
                raise BudgetMistake(f"{path} has {path.stat().st_size:,} bytes: give latencies in {_FORM}.")
            text = path.read_text(encoding="utf-8-sig")  # as spreadsheets write it
            rows = csv.DictReader(text.splitlines(), restval="")
            given = list(rows)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise BudgetMistake(f"{path} cannot be read as latencies ({error}): give {_FORM}.") from error
        if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
            raise BudgetMistake(f"{path} has no column {missing[0]}: give {_FORM}.")
        table: dict[tuple[str, int, int], int] = {}
        for number, row in enumerate(given, 2):
            try:
                key = row["layer"], int(row["weight_bits"]), int(row["activation_bits"])
                ms = Decimal(row["ms"])
            except (ValueError, DecimalException) as error:
                raise BudgetMistake(
                    f"{path}, line {number} holds no number where one is to be: give {_FORM}."
                ) from error
            if not ms.is_finite() or not 0 <= ms <= _MOST:
                raise BudgetMistake(f"{path}, line {number}: {row['ms']} is no latency in ms: give one from 0 on.")
            if key in table:
                raise BudgetMistake(
                    f"{path}, line {number}: {key[0]} at {_bits(*key[1:])} is there twice: give it once."
                )
            table[key] = math.ceil(ms * PICOSECONDS)
        return Latencies(str(path), digest(text.encode()), table)

    def of(self, layer: Layer, weight_bits: LayerBits, activation_bits: int) -> int:
        """Of `layer`, of which each output channel has its equal share, or of some of its channels; raises
        `BudgetMistake`."""
        counts = {weight_bits: layer.out_channels} if isinstance(weight_bits, int) else Counter(weight_bits)
        return sum(self._whole(layer, bits, activation_bits) // layer.out_channels * counts[bits] for bits in counts)

    def total(self, layers: Sequence[Layer], allocation: Allocation) -> int | None:
        """Of all of them with these bits; None where those of one are not known."""
        try:
            return sum(map(self.of, layers, allocation.weights, allocation.activations))
        except BudgetMistake:
            return None

    def _whole(self, layer: Layer, weight_bits: int, activation_bits: int) -> int:
        if (layer.name, weight_bits, activation_bits) not in self.table:
            raise BudgetMistake(
                f"{self.source} has no latency of layer {layer.name} at {_bits(weight_bits, activation_bits)}: add it, "
                "or leave these bits out."
            )
        return self.table[layer.name, weight_bits, activation_bits]


def _bits(weight: int, activation: int) -> str:
    return f"{weight} bits with inputs of {activation}"
