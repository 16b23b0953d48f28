"""The bits that layers may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from tap_eval.mistake import BitsMistake
from tap_eval.preparing.layers import Layer
from tap_eval.quantization.quantizer import Allocation


@dataclass(frozen=True)
class Choices:
    """The bits a layer may take; `pin_ends` holds the first and the last layer at the most.

    With more than one of `channel_groups`, a layer whose output channels have scores of their
    own is cut into so many groups of channels, of like scores, and each takes bits of its own.
    """

    weights: tuple[int, ...] = (2, 4, 8)
    activations: tuple[int, ...] = (8,)
    pin_ends: bool = False
    channel_groups: int = 1

    def __post_init__(self) -> None:
        if self.channel_groups < 1:
            raise BitsMistake(f"{self.channel_groups} channel groups: give 1 for bits a layer, or more.")
        for what, bits in (("weights", self.weights), ("activations", self.activations)):
            if not bits or any(not 2 <= choice <= 8 for choice in bits) or len(set(bits)) < len(bits):
                raise BitsMistake(
                    f"bits {list(bits)} for {what}: give different whole numbers from 2 to 8, as in 2,4,8."
                )

    def of(self, layer: Layer) -> list[tuple[int, int]]:
        """The (weight, activation) bits that `layer` may take, the cheapest first."""
        if self.pin_ends and (layer.first or layer.last):
            return [(max(self.weights), max(self.activations))]
        return list(product(sorted(self.weights), sorted(self.activations)))


def uniform(layers: Sequence[Layer], weight_bits: int, activation_bits: int = 8) -> Allocation:
    """The same bits everywhere."""
    return Allocation((weight_bits,) * len(layers), (activation_bits,) * len(layers))
