"""Bits from sensitivity scores, under a budget that is never exceeded.

A multiple-choice knapsack, solved exactly: each layer, or each group of its output channels,
takes one of its choices, and the sum of `weight(score) * 4**-bits` is smallest. `4**-bits` is
how the squared error of rounding falls with bits.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from tap_eval.allocation.budget import Budget, check_feasible, check_within
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.score import Score, importance
from tap_eval.allocation.unit import Unit, units_of
from tap_eval.preparing.layers import Layer
from tap_eval.quantization.quantizer import Allocation, LayerBits

EXACT_UNITS = 250
"""with more units than this, the solver may stop within a millionth of the optimum"""


def allocate(scores: Sequence[Score], layers: Sequence[Layer], choices: Choices, budget: Budget) -> Allocation:
    """The allocation that costs least by `scores`, within `budget`; exact, the same on every call.

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

    Raises `BudgetMistake` when the budget is below what the smallest bits need.
    """
    check_feasible(layers, choices, budget)
    options = [(index, *bits) for index, unit in enumerate(units) for bits in choices.of(layers[unit.layer])]
    losses = np.array([loss(*option) for option in options])
    costs = [units[index].cost(layers[units[index].layer], budget, *bits) for index, *bits in options]
    unit = math.gcd(*costs)  # small whole numbers keep the solver exact
    one_each = np.array([[float(index == place) for index, _, _ in options] for place in range(len(units))])
    within = np.array([[cost // unit for cost in costs]], dtype=np.float64)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(within, -np.inf, budget.limit(layers) // unit)]
    if same := _same_activations(units, options):
        constraints.append(LinearConstraint(np.array(same), 0, 0))
    with _c_stdout_closed():
        solution = milp(
            losses / losses.max(),
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0 if len(units) <= EXACT_UNITS else 1e-6},
        )
    if solution.x is None:
        raise RuntimeError(f"the solver found no allocation within {budget.text}: {solution.message}")
    taken = [option for option, share in zip(options, solution.x, strict=True) if share > 0.5]
    allocation = _allocation(taken, units, layers)
    check_within(allocation, layers, budget)
    return allocation


def _same_activations(units: Sequence[Unit], options: Sequence[tuple[int, int, int]]) -> list[list[float]]:
    """Equations that give all groups of a layer, which have one input, one choice of activation bits."""
    first: dict[int, int] = {}
    rows: list[list[float]] = []
    activations = sorted({activation for _, _, activation in options})
    for index, unit in enumerate(units):
        leader = first.setdefault(unit.layer, index)
        if leader != index and len(activations) > 1:
            rows += [
                [float(act == bits) * ((place == index) - (place == leader)) for place, _, act in options]
                for bits in activations
            ]
    return rows


def _allocation(taken: Sequence[tuple[int, int, int]], units: Sequence[Unit], layers: Sequence[Layer]) -> Allocation:
    weights: list[LayerBits] = [0] * len(layers)
    activations = [0] * len(layers)
    channels = {unit.layer: [0] * layers[unit.layer].out_channels for unit in units if unit.channels}
    for index, weight, activation in taken:
        unit = units[index]
        activations[unit.layer] = activation
        weights[unit.layer] = weight
        for channel in unit.channels or ():
            channels[unit.layer][channel] = weight
    for layer, bits in channels.items():
        weights[layer] = bits[0] if len(set(bits)) == 1 else tuple(bits)
    return Allocation(tuple(weights), tuple(activations))


@contextmanager
def _c_stdout_closed() -> Iterator[None]:
    """Drops what C code prints: HiGHS prints a debugging line now and then (jump-dev/HiGHS.jl#312).

    Only C's own `stdout` stream is swapped, where the platform names it so; Python's is not touched.
    """
    try:
        stream = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stdout")
    except (ValueError, OSError, TypeError):
        yield
        return
    with _SOLVING:
        before, stream.value = stream.value, _c_null()
        try:
            yield
        finally:
            stream.value = before


@cache
def _c_null() -> int:
    """A C stream that goes nowhere."""
    fopen = ctypes.CDLL(None).fopen
    fopen.restype = ctypes.c_void_p
    return fopen(os.devnull.encode(), b"w")


_SOLVING = threading.Lock()
