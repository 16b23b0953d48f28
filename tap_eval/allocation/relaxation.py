"""What the allocations of very many scores leave of rounding errors, without allocating: the knapsack relaxed.

Where a layer, or a group of its channels, may also take a little of one choice and a little of the next, the allocation
of least loss is what is cheapest for each at one price of cost (Lagrange), at which the budget is spent. Prices are
found for all scores together, so that hundreds of them take as long as a few exact allocations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.score import squashed
from tap_eval.preparing.layers import Layer

_LEAST, _MOST = -60.0, 10.0
"""logarithms of prices, at which all take the most bits and the fewest"""
_HALVINGS = 30


class Relaxation:
    """Of the allocations of one network within one budget, of which bytes for the bits of channels are not counted."""

    def __init__(self, layers: Sequence[Layer], choices: Choices, budget: Budget) -> None:
        options = [budget.options(layer, choices) for layer in layers]
        most = max(map(len, options))
        options = [each * (most // len(each)) for each in options]  # as in `tap_eval.allocation.allocator.minimize`
        self._errors = np.array([[4.0**-weight + 4.0**-activation for weight, activation in each] for each in options])
        costs = [
            [budget.cost(layer, *bits) + budget.range_cost(layer, bits[1]) for bits in each]
            for layer, each in zip(layers, options, strict=True)
        ]
        self._costs = np.array(costs, np.float64)
        self._limit = budget.limit(layers)

    def errors(self, logarithms: np.ndarray) -> np.ndarray:
        """Of scores whose `logarithms` (Q, L, G) are given, the squared errors of rounding that are left in each layer
        (Q, L), as shares of those at its fewest bits.

        A layer's channels are in G groups of one size; where all of them have the same score they are one.
        """
        count, groups = len(logarithms), logarithms.shape[2]
        z = logarithms - logarithms.mean((1, 2), keepdims=True)
        importance = squashed(z)[..., None] / groups
        losses = importance * self._errors[:, None]
        costs = np.broadcast_to(self._costs[:, None] / groups, losses.shape)
        errors = np.broadcast_to(self._errors[:, None] / groups, losses.shape)

        def at(price: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            taken = (losses + np.exp(price)[:, None, None, None] * costs).argmin(3)[..., None]
            cost, left = (np.take_along_axis(each, taken, 3).sum((2, 3)) for each in (costs, errors))
            return cost.sum(1), left

        low, high = np.full(count, _LEAST), np.full(count, _MOST)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = at(middle)[0] > self._limit
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        (cost, left), (less, more_left) = at(low), at(high)
        share = np.clip((self._limit - less) / np.maximum(cost - less, 1e-9), 0, 1)[:, None]
        found: np.ndarray = (more_left + share * (left - more_left)) / self._errors.max(1)
        return found
