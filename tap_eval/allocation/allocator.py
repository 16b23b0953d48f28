"""Bits from sensitivity scores, under a budget that is never exceeded.

A multiple-choice knapsack, solved exactly: each layer, or each group of its output channels,
takes one of its choices, and the sum of `weight(score) * 4**-bits` is smallest. `4**-bits` is
how the squared error of rounding falls with bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tap_eval.allocation import knapsack
from tap_eval.allocation.budget import Budget, check_feasible, check_within
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.score import Score, importance
from tap_eval.allocation.unit import Unit, units_of
from tap_eval.preparing.layers import Layer
from tap_eval.quantization.quantizer import Allocation, LayerBits


def allocate(scores: Sequence[Score], layers: Sequence[Layer], choices: Choices, budget: Budget) -> Allocation:
    """The allocation that costs least by `scores`, within `budget`; the same on every call.

    Exact, but where `knapsack` says otherwise: in networks of dozens of layers of nearly the same size.

    The loss of a layer is `weight(score) * (4**-weight bits + 4**-activation bits)`; that of a
    group of channels likewise, by its share of the layer. Raises `BudgetMistake` when the
    budget is below what the smallest bits need.
    """
    units = units_of(scores, layers, choices)
    weights = importance([score for _, score in units])
    shares = [unit.share(layers[unit.layer]) for unit, _ in units]
    return minimize(
        lambda index, weight, activation: float(weights[index]) * shares[index] * (4.0**-weight + 4.0**-activation),
        [unit for unit, _ in units],
        layers,
        choices,
        budget,
    )


def minimize(
    loss: Callable[[int, int, int], float],
    units: Sequence[Unit],
    layers: Sequence[Layer],
    choices: Choices,
    budget: Budget,
) -> Allocation:
    """The allocation within `budget` with the least sum of `loss(unit index, weight bits, activation bits)`.

    Losses are not negative, and the units are in the order of the layers. Raises `BudgetMistake`
    when the budget is below what the smallest bits need, `ValueError` where a loss is NaN or infinite.
    """
    check_feasible(layers, choices, budget)
    size = len(choices.weights) * len(choices.activations)
    options = [budget.options(layers[unit.layer], choices) for unit in units]
    options = [each * (size // len(each)) for each in options]  # where there is but one, it stands for all
    shape = len(units), len(choices.weights), len(choices.activations)
    losses = [loss(place, *bits) for place, each in enumerate(options) for bits in each]
    if not np.isfinite(losses).all():
        raise ValueError("a loss is NaN or infinite, from which no allocation follows")
    starts = np.flatnonzero(np.diff([unit.layer for unit in units], prepend=-1))
    costs = [
        units[place].cost(layers[units[place].layer], budget, *bits)
        + (budget.range_cost(layers[units[place].layer], bits[1]) if place in starts else 0)
        for place, each in enumerate(options)
        for bits in each
    ]
    cut = {unit.layer for unit in units if unit.channels}
    mixing = np.array([budget.mixing_cost(layer) if layer.index in cut else 0 for layer in layers], np.int64)
    taken = knapsack.solve(
        np.array(losses, np.float64).reshape(shape),
        np.array(costs, np.int64).reshape(shape),
        starts,
        mixing,
        min(budget.limit(layers), sum(costs) + int(mixing.sum())),
    )
    allocation = _allocation([each[place] for each, place in zip(options, taken, strict=True)], units, layers)
    check_within(allocation, layers, budget)
    return allocation


def _allocation(taken: Sequence[tuple[int, int]], units: Sequence[Unit], layers: Sequence[Layer]) -> Allocation:
    weights: list[LayerBits] = [0] * len(layers)
    activations = [0] * len(layers)
    channels = {unit.layer: [0] * layers[unit.layer].out_channels for unit in units if unit.channels}
    for unit, (weight, activation) in zip(units, taken, strict=True):
        activations[unit.layer] = activation
        weights[unit.layer] = weight
        for channel in unit.channels or ():
            channels[unit.layer][channel] = weight
    for layer, bits in channels.items():
        weights[layer] = bits[0] if len(set(bits)) == 1 else tuple(bits)
    return Allocation(tuple(weights), tuple(activations))
