"""A rule that bits are allocated by: where it comes from, what it sees, and how its scores become an allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tap_eval.allocation.allocator import allocate, minimize
from tap_eval.allocation.unit import Unit
from tap_eval.measuring.bench import Bench
from tap_eval.quantization.quantizer import Allocation

Seen = Literal["weights", "images", "labels", "gradients", "Hessian", "measured errors"]
_LEAST = 1e-12
"""of the largest score: a smaller one, or none, counts as this, for scores that are not positive are no ratios"""


class Effort(NamedTuple):
    """What a rule may take."""

    seed: int
    measurements: int
    """of allocations, for a rule that tries some: as many as a search measures proxies"""


@dataclass(frozen=True)
class Cost:
    """What a rule looked at, but for allocating, which takes a moment."""

    images: int = 0
    steps: int = 0
    """times that it went through them: gradients, Hessian-vector products, or measured networks"""
    seconds: float = 0.0
    """when it was computed: what is kept is not computed again"""


@dataclass(frozen=True)
class Found:
    """A rule's allocations for one network: several where it draws at random, none where it has nothing to give."""

    allocations: tuple[Allocation, ...]
    cost: Cost = Cost()
    note: str = ""
    label: str = ""
    """in place of the rule's own"""


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


def by_scores(bench: Bench, scores: Sequence[float]) -> Allocation:
    """What the allocator makes of a score a layer, as of a proxy's."""
    return allocate(scores, bench.layers, bench.task.choices, bench.task.budget)


def by_ratios(bench: Bench, scores: Sequence[float]) -> Allocation:
    """The same of scores that are sizes, of which the allocator takes ratios, some of which may be 0."""
    least = max(scores) * _LEAST or 1.0
    return by_scores(bench, [max(score, least) for score in scores])


def by_losses(bench: Bench, losses: Sequence[Mapping[int, float]]) -> Allocation:
    """The least sum of what layers lose at their bits, given by weight bits, none negative.

    Fewer activation bits add to a layer's loss as much of it as they add to the error of rounding its input.
    """
    return _minimized(bench, lambda layer, weight, activation: losses[layer][weight] * (1 + 4.0**-activation))


def by_gains(bench: Bench, gains: Sequence[float]) -> Allocation:
    """The greatest sum of a layer's bits, those of weights and of its input, times its gain, none negative."""
    most = max(bench.task.choices.weights) + max(bench.task.choices.activations)
    return _minimized(bench, lambda layer, weight, activation: gains[layer] * (most - weight - activation))


def by_operations(bench: Bench) -> Allocation:
    """The greatest sum of macs * weight bits * activation bits."""
    choices = bench.task.choices
    most = max(choices.weights) * max(choices.activations)
    return _minimized(bench, lambda layer, weight, activation: bench.layers[layer].macs * (most - weight * activation))


def _minimized(bench: Bench, loss: Callable[[int, int, int], float]) -> Allocation:
    units = [Unit(layer.index) for layer in bench.layers]
    return minimize(loss, units, bench.layers, bench.task.choices, bench.task.budget)
