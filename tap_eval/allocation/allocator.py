"""Bits from sensitivity scores, under a budget that is never exceeded.

A multiple-choice knapsack, solved exactly: each layer, or each group of its output channels,
takes one of its choices, and the sum of `weight(score) * 4**-bits` is smallest. `4**-bits` is
how the squared error of rounding falls with bits.
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

from tap_eval.allocation.score import Score, layer_score
from tap_eval.mistake import BitsMistake, BudgetMistake
from tap_eval.networks.layers import Layer
from tap_eval.quantization.quantizer import Allocation, LayerBits

BUDGETS = "3bit, 87%, 0.1MB or 1.2GBOPs"
REACH = math.log(4.0**3)
"""how far from the mean a score counts with its ratio: to about three bits"""
EXACT_UNITS = 250
"""with more units than this, the solver may stop within a millionth of the optimum"""
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

    def cost(self, layer: Layer, weight_bits: LayerBits, activation_bits: int) -> int:
        """What `layer` takes of the limit: params * bits, or macs * weight bits * activation bits."""
        if self.unit == "BOPs":
            return _over_channels(layer.macs, layer, weight_bits) * activation_bits
        return _over_channels(layer.params, layer, weight_bits)


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


def weight_size(layers: Sequence[Layer], allocation: Allocation) -> int:
    """Size of the weights in bits."""
    return sum(
        _over_channels(layer.params, layer, bits) for layer, bits in zip(layers, allocation.weights, strict=True)
    )


def bops(layers: Sequence[Layer], allocation: Allocation) -> int:
    """Bit operations an image: the sum over layers of macs * weight bits * activation bits."""
    pairs = zip(allocation.weights, allocation.activations, strict=True)
    return sum(
        _over_channels(layer.macs, layer, weight) * activation
        for layer, (weight, activation) in zip(layers, pairs, strict=True)
    )


def _over_channels(amount: int, layer: Layer, bits: LayerBits) -> int:
    """Sum of bits over `amount` of a layer's weights or macs, of which each output channel has its equal share."""
    return amount * bits if isinstance(bits, int) else amount // layer.out_channels * sum(bits)


def check_feasible(layers: Sequence[Layer], choices: Choices, budget: Budget) -> None:
    """Raises `BudgetMistake` when even the cheapest allocation is above the budget."""
    least = sum(budget.cost(layer, *choices.of(layer)[0]) for layer in layers)
    if least > budget.limit(layers):
        unit = {"bit": sum(layer.params for layer in layers), "B": 8, "BOPs": 1}
        smallest = (
            f"{100 * (1 - least / 32 / unit['bit']):.2f}%"
            if budget.unit == "%"
            else f"{least / unit[budget.unit]:,.6g} {'bit' if budget.unit == 'bit' else budget.unit}"
        )
        raise BudgetMistake(
            f"a budget of {budget.text} is below what the smallest bits need, {smallest}: "
            "raise the budget or allow fewer bits with --bits."
        )


def importance(scores: Sequence[float]) -> np.ndarray:
    """`weight(score)`: a monotone map of scores to positive numbers, (N,) float64.

    `exp(REACH * tanh(z / REACH))` with `z` the logarithm of the score, from the mean of all.
    Near the mean, scores count with their ratios; far from it they keep their order, however
    wildly they are scaled. Scores of which some are not positive have no logarithm: they are
    taken for logarithms themselves, `z` being their distance from the mean in standard
    deviations.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.min() > 0:
        z = np.log(values)
        z -= z.mean()
    else:
        z = values / max(np.abs(values).max(), 1e-300)  # so that squares do not overflow
        z = (z - z.mean()) / (z.std() or 1.0)
    return np.exp(REACH * np.tanh(z / REACH))


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
                channels = tuple(sorted(int(channel) for channel in group))
                units.append((Unit(layer.index, channels), layer_score([score[channel] for channel in channels])))
    return units


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
