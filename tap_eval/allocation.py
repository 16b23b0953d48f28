"""Bits from sensitivity scores, under a budget that is never exceeded.

A multiple-choice knapsack, solved exactly: each layer takes one of its choices, and the sum
over layers of `weight(score) * 4**-bits` is smallest. `4**-bits` is how the squared error
of rounding falls with bits.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.stats import rankdata

from tap_eval.layers import Layer
from tap_eval.mistake import BitsMistake, BudgetMistake
from tap_eval.quantizer import Allocation

BUDGETS = "3bit, 87%, 0.1MB or 1.2GBOPs"
_PREFIX = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class Budget:
    """A limit on weight size (in bits) or on bit operations an image, as the user wrote it."""

    text: str
    unit: Literal["bit", "%", "B", "BOPs"]
    amount: float

    @staticmethod
    def parse(text: str) -> Budget:
        """Reads `3bit`, `87%` (smaller than float32 by that much), `0.1MB` or `1.2GBOPs`."""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:(bits?)|(%)|([KMGT]?i?)(BOPs|B))\s*", text, re.IGNORECASE)
        if not match:
            raise BudgetMistake(f"'{text}' is no budget: give one like {BUDGETS}.")
        amount, bits, percent, prefix, unit = match.groups()
        value = float(amount)
        if bits:
            return Budget(text.strip(), "bit", value)
        if percent:
            return Budget(text.strip(), "%", value)
        factor = _PREFIX.get(prefix.upper())
        if factor is None:
            raise BudgetMistake(f"'{text}' is no budget: give one like {BUDGETS}.")
        return Budget(text.strip(), "BOPs" if unit.lower() == "bops" else "B", value * factor)

    def limit(self, layers: Sequence[Layer]) -> int:
        """The most bits of weights, or for BOPs the most bit operations, that `layers` may take."""
        params = sum(layer.params for layer in layers)
        exact = {
            "bit": self.amount * params,
            "%": (1 - self.amount / 100) * 32 * params,
            "B": self.amount * 8,
            "BOPs": self.amount,
        }[self.unit]
        return math.floor(exact + 1e-6)

    def cost(self, layer: Layer, weight_bits: int, activation_bits: int) -> int:
        """What `layer` takes of the limit: params * bits, or macs * weight bits * activation bits."""
        if self.unit == "BOPs":
            return layer.macs * weight_bits * activation_bits
        return layer.params * weight_bits


@dataclass(frozen=True)
class Choices:
    """The bits a layer may take; `pin_ends` holds the first and the last layer at the most."""

    weights: tuple[int, ...] = (2, 4, 8)
    activations: tuple[int, ...] = (8,)
    pin_ends: bool = False

    def __post_init__(self) -> None:
        for what, bits in (("weights", self.weights), ("activations", self.activations)):
            if not bits or any(not 2 <= choice <= 8 for choice in bits) or len(set(bits)) < len(bits):
                raise BitsMistake(f"bits {list(bits)} for {what}: give different whole numbers from 2 to 8, as in 2,4,8.")

    def of(self, layer: Layer) -> list[tuple[int, int]]:
        """The (weight, activation) bits that `layer` may take, the cheapest first."""
        if self.pin_ends and (layer.first or layer.last):
            return [(max(self.weights), max(self.activations))]
        return list(product(sorted(self.weights), sorted(self.activations)))


def uniform(layers: Sequence[Layer], weight_bits: int, activation_bits: int = 8) -> Allocation:
    """The same bits everywhere."""
    return Allocation((weight_bits,) * len(layers), (activation_bits,) * len(layers))


def weight_size(layers: Sequence[Layer], allocation: Allocation) -> int:
    """Size of the weights in bits."""
    return sum(layer.params * bits for layer, bits in zip(layers, allocation.weights, strict=True))


def bops(layers: Sequence[Layer], allocation: Allocation) -> int:
    """Bit operations an image: the sum over layers of macs * weight bits * activation bits."""
    pairs = zip(allocation.weights, allocation.activations, strict=True)
    return sum(layer.macs * weight * activation for layer, (weight, activation) in zip(layers, pairs, strict=True))


def check_feasible(layers: Sequence[Layer], choices: Choices, budget: Budget) -> None:
    """Raises `BudgetMistake` when even the cheapest allocation is above the budget."""
    least = sum(budget.cost(layer, *choices.of(layer)[0]) for layer in layers)
    if least > budget.limit(layers):
        unit = {"bit": sum(layer.params for layer in layers), "B": 8, "BOPs": 1}
        smallest = (
            f"{100 * (1 - least / 32 / unit['bit']):.2f}%" if budget.unit == "%"
            else f"{least / unit[budget.unit]:,.6g} {'bit' if budget.unit == 'bit' else budget.unit}"
        )
        raise BudgetMistake(
            f"a budget of {budget.text} is below what the smallest bits need, {smallest}: "
            "raise the budget or allow fewer bits with --bits."
        )


def importance(scores: Sequence[float]) -> np.ndarray:
    """`weight(score)`: a monotone map of scores to [1, 16], (layers,) float64.

    `4 ** (rank + position)`, where `rank` is the score's rank and `position` its place between
    the least and the greatest score, both scaled to [0, 1]. Only differences between scores
    count, so negative scores are as good as positive ones; the rank keeps its say however
    wildly the scores are scaled. In the relaxed problem the most sensitive layer gets two bits
    more than the least.
    """
    values = np.asarray(scores, dtype=np.float64)
    order = rankdata(values) - 1
    with np.errstate(over="ignore"):
        spread = np.ptp(values)
    if not np.isfinite(spread):
        values, spread = values / 4, np.ptp(values / 4)
    rank = order / max(order.max(), 1)
    position = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    return 4.0 ** (rank + position)


def allocate(scores: Sequence[float], layers: Sequence[Layer], choices: Choices, budget: Budget) -> Allocation:
    """The allocation that costs least by `scores`, within `budget`; exact, the same on every call.

    Raises `BudgetMistake` when the budget is below what the smallest bits need.
    """
    weights = importance(scores)
    return minimize(
        lambda index, weight, activation: float(weights[index]) * (4.0**-weight + 4.0**-activation),
        layers,
        choices,
        budget,
    )


def minimize(
    loss: Callable[[int, int, int], float], layers: Sequence[Layer], choices: Choices, budget: Budget
) -> Allocation:
    """The allocation within `budget` with the least sum of `loss(layer index, weight bits, activation bits)`."""
    check_feasible(layers, choices, budget)
    options = [(index, *bits) for index, layer in enumerate(layers) for bits in choices.of(layer)]
    losses = np.array([loss(*option) for option in options])
    costs = [budget.cost(layers[index], weight, activation) for index, weight, activation in options]
    unit = math.gcd(*costs)  # small whole numbers keep the solver exact
    one_each = np.array([[float(index == layer) for index, _, _ in options] for layer in range(len(layers))])
    within = np.array([[cost // unit for cost in costs]], dtype=np.float64)
    with _c_stdout_closed():
        solution = milp(
            losses / losses.max(),
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(within, -np.inf, budget.limit(layers) // unit),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if solution.x is None:
        raise RuntimeError(f"the solver found no allocation within {budget.text}: {solution.message}")
    taken = [option for option, share in zip(options, solution.x, strict=True) if share > 0.5]
    allocation = Allocation(tuple(weight for _, weight, _ in taken), tuple(act for _, _, act in taken))
    check_within(allocation, layers, budget)
    return allocation


def spent(allocation: Allocation, layers: Sequence[Layer], budget: Budget) -> int:
    """What `allocation` takes of `budget.limit(layers)`."""
    return sum(map(budget.cost, layers, allocation.weights, allocation.activations))


def check_within(allocation: Allocation, layers: Sequence[Layer], budget: Budget) -> None:
    """Raises `BudgetMistake` when `allocation` is above the budget, by however little."""
    over = spent(allocation, layers, budget) - budget.limit(layers)
    if over > 0:
        unit = "bit operations" if budget.unit == "BOPs" else "bits of weights"
        raise BudgetMistake(f"the allocation is {over:,} {unit} above the budget of {budget.text}.")


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
