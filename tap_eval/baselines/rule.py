"""A rule that bits are allocated by: where it comes from, what it sees, and how its scores become an allocation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tap_eval.allocation.allocator import minimize
from tap_eval.allocation.score import importance
from tap_eval.allocation.unit import Unit
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import NetworkMistake
from tap_eval.preparing.layers import Layer
from tap_eval.quantization.quantizer import Allocation

Seen = Literal["weights", "images", "labels", "gradients", "Hessian", "measured errors"]
Loss = Callable[[int, int, int], float]
"""what a layer, by index, loses with these bits of weights and of its input"""
_MOST = 8
"""bits there are"""
_LEAST = 1e-12
"""of the largest score: a smaller one, or none, counts as this, for scores that are not positive are no ratios"""


class Effort(NamedTuple):
    """What a rule may take."""

    seed: int
    measurements: int
    """of allocations, for a rule that tries some: as many as a search makes on a network"""


@dataclass(frozen=True)
class Cost:
    """What a rule looked at, but for allocating, which takes a moment."""

    images: int = 0
    steps: int = 0
    """times that it went through them: gradients, Hessian-vector products, or measured networks"""
    seconds: float = 0.0
    """when it was computed: what is kept is not computed again; 0 where that is not known"""
    rounds: bool = False
    """whether all layers had to be rounded at all bits before, which is not in the seconds"""


@dataclass(frozen=True)
class Found:
    """A rule's allocations for one network: several where it draws at random, none where it has nothing to give."""

    allocations: tuple[Allocation, ...]
    cost: Cost = Cost()
    note: str = ""
    label: str = ""
    """in place of the rule's own"""
    loss: Loss | None = None
    """by which any other allocation can be told better or worse; theirs is the least, but for what a rule rounds"""


@dataclass(frozen=True)
class Rule:
    """How bits are allocated without a proxy."""

    label: str
    equation: str
    """what is minimized, or what a layer's score is, as a formula in text"""
    source: str
    sees: tuple[Seen, ...]
    find: Callable[[Bench, Effort], Found]
    """raises a `Mistake` where the network has not what the rule needs"""
    fast: bool = False
    """whether every result is shown beside it"""
    searches: bool = False
    """whether it measures allocations to find one"""


def finite(bench: Bench, values: Sequence[float]) -> None:
    """Raises `NetworkMistake` at the first of the layers' values that is NaN or infinite: nothing follows from it."""
    for layer, value in zip(bench.layers, values, strict=True):
        if not math.isfinite(value):
            raise NetworkMistake(
                f"of {layer.name} in {bench.name} it computes {value}, from which no bits follow: leave it out of "
                "--baselines."
            )


def searched(bench: Bench, best: Allocation, passes: int, seconds: float, kept: bool, note: str = "") -> Found:
    """What a search found that measured allocations, as much as so many on all images that candidates are compared on.

    Where some were `kept`, the seconds are not its own.
    """
    untold = "some of its measurements are from before, so that its seconds are not known" if kept else ""
    cost = Cost(bench.compared, passes, 0.0 if kept else seconds, True)
    return Found((best,), cost, "; ".join(filter(None, [note, untold])))


def minimizing(bench: Bench, loss: Loss, cost: Cost = Cost(), note: str = "") -> Found:
    """The allocation that loses least in the sum over layers, none of which is negative.

    Raises `BudgetMistake` when the budget is below what the smallest bits need.
    """
    return Found((least(bench, loss),), cost, note, loss=loss)


def least(bench: Bench, loss: Loss) -> Allocation:
    """That allocation by itself; raises as `minimizing` does."""
    units = [Unit(layer.index) for layer in bench.layers]
    return minimize(loss, units, bench.layers, bench.task.choices, bench.task.budget)


def by_scores(scores: Sequence[float]) -> Loss:
    """What the allocator makes of a score a layer, as of a proxy's."""
    weights = importance(scores)
    return lambda layer, weight, activation: float(weights[layer]) * (4.0**-weight + 4.0**-activation)


def by_ratios(scores: Sequence[float]) -> Loss:
    """The same of scores that are sizes, of which the allocator takes ratios, some of which may be 0."""
    smallest = max(scores) * _LEAST or 1.0
    return by_scores([max(score, smallest) for score in scores])


def by_losses(losses: Sequence[Mapping[int, float]]) -> Loss:
    """What layers lose, given by weight bits; an input loses at its bits what the weights lose at as many, by a law of
    `4**-bits` from the fewest on."""

    def lost(layer: int, weight: int, activation: int) -> float:
        least = min(losses[layer])
        return losses[layer][weight] + losses[layer][least] * 4.0 ** (least - activation)

    return lost


def by_gains(gains: Sequence[float]) -> Loss:
    """So that the sum of layers' bits, those of weights and of inputs, each times the layer's gain, is greatest."""
    return lambda layer, weight, activation: gains[layer] * (2 * _MOST - weight - activation)


def by_operations(layers: Sequence[Layer]) -> Loss:
    """So that the sum of macs * weight bits * activation bits is greatest."""
    return lambda layer, weight, activation: float(layers[layer].macs * (_MOST**2 - weight * activation))
