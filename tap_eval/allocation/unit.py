"""What takes bits of its own: a layer, or some of its output channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.score import Score, layer_score
from tap_eval.preparing.layers import Layer


@dataclass(frozen=True)
class Unit:
    """What takes bits of its own: a layer (by its index), or some of its output channels."""

    layer: int
    channels: tuple[int, ...] | None = None

    def share(self, layer: Layer) -> float:
        """Of the layer's output channels, in (0, 1]."""
        return 1.0 if self.channels is None else len(self.channels) / layer.out_channels

    def cost(self, layer: Layer, budget: Budget, weight_bits: int, activation_bits: int) -> int:
        """What the unit takes of the budget."""
        return budget.cost(
            layer, (weight_bits,) * len(self.channels) if self.channels else weight_bits, activation_bits
        )


def units_of(scores: Sequence[Score], layers: Sequence[Layer], choices: Choices) -> list[tuple[Unit, float]]:
    """The units to which `scores` lead, each with its score; channels of like scores are in a group."""
    units: list[tuple[Unit, float]] = []
    for layer, score in zip(layers, scores, strict=True):
        if isinstance(score, float | int):
            units.append((Unit(layer.index), score))
        elif choices.channel_groups == 1 or len(choices.of(layer)) == 1:
            units.append((Unit(layer.index), layer_score(score)))
        else:
            order = np.argsort(np.asarray(score), kind="stable")
            for group in np.array_split(order, min(choices.channel_groups, layer.out_channels)):
                channels = tuple(np.sort(group).tolist())
                units.append((Unit(layer.index, channels), layer_score([score[channel] for channel in channels])))
    return units
