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
_HALVINGS = 26


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
        self._most = 4.0 ** -min(choices.weights)
        self._limit = budget.limit(layers)

    def errors(self, logarithms: np.ndarray) -> np.ndarray:
        """Of scores whose `logarithms` (Q, L, G) are given, the squared errors of rounding that are left in each layer
        (Q, L), as shares of those that weights have at the fewest bits to choose from.

        A layer's channels are in G groups of one size; where all of them have the same score they are one.
        """
        count, layers, groups = logarithms.shape
        z = (logarithms - logarithms.mean((1, 2), keepdims=True)).reshape(count, -1)
        errors, costs = (each.repeat(groups, axis=0) / groups for each in (self._errors, self._costs))
        losses, first = squashed(z)[..., None] * errors, errors.shape[1] * np.arange(len(errors))

        def taken(price: np.ndarray) -> np.ndarray:
            found: np.ndarray = first + (losses + np.exp(price)[:, None, None] * costs).argmin(2)
            return found

        def spent(chosen: np.ndarray) -> np.ndarray:
            found: np.ndarray = costs.take(chosen).sum(1)
            return found

        low, high = np.full(count, _LEAST), np.full(count, _MOST)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = spent(taken(middle)) > self._limit
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        more, fewer = taken(low), taken(high)
        most, least = spent(more), spent(fewer)
        share = np.clip((self._limit - least) / np.maximum(most - least, 1e-9), 0, 1)[:, None]
        left = share * errors.take(more) + (1 - share) * errors.take(fewer)
        found: np.ndarray = left.reshape(count, layers, groups).sum(2) / self._most
        return found
