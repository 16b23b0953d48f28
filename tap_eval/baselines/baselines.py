"""What a proxy is compared with at the same budget: simple rules, and what sees more than a proxy may."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tap_eval.allocation.allocator import allocate, minimize
from tap_eval.allocation.budget import most_uniform
from tap_eval.allocation.unit import Unit
from tap_eval.measuring.bench import Bench
from tap_eval.quantization.quantizer import Allocation

RANDOM_ALLOCATIONS, _OF_LARGE = 5, 3
_LARGE = 10**7
"""weights from which a network takes so long to be finished that fewer random allocations of it are measured"""


@dataclass(frozen=True)
class Baseline:
    """A rule's allocations for one network; several where it draws at random."""

    label: str
    note: str
    allocations: tuple[Allocation, ...]


def baselines(bench: Bench, seed: int) -> list[Baseline]:
    """Those that every result is shown beside."""
    layers, task = bench.layers, bench.task
    rng = random.Random(seed)

    def allocated(scores: list[float]) -> Allocation:
        return allocate(scores, layers, task.choices, task.budget)

    count = _OF_LARGE if sum(layer.params for layer in layers) >= _LARGE else RANDOM_ALLOCATIONS
    drawn = tuple(allocated([rng.random() for _ in layers]) for _ in range(count))
    return [
        *_uniform(bench),
        Baseline("random scores", f"mean of {count}", drawn),
        Baseline("earlier layers get more", "", (allocated([-float(layer.index) for layer in layers]),)),
        Baseline("weight error", "least sum of squared weight errors", (_weight_error(bench),)),
        Baseline("measured layer error", "sees what a proxy may not", (allocated(bench.layer_errors),)),
    ]


def _uniform(bench: Bench) -> list[Baseline]:
    """The most equal bits that the budget allows, whether they are among the choices or not."""
    activation = max(bench.task.choices.activations)
    same = most_uniform(bench.layers, activation, bench.task.budget)
    if same is None:
        return []
    note = "" if same.most in bench.task.choices.weights else "these bits are not among the choices"
    return [Baseline(f"uniform W{same.most}A{activation}", note, (same,))]


def _weight_error(bench: Bench) -> Allocation:
    """Minimizes the sum over layers of ||Q_b(W) - W||^2, from the weights alone."""
    errors = bench.weight_errors
    return minimize(
        lambda index, weight, activation: errors[index][weight] * (1 + 4.0**-activation),
        [Unit(layer.index) for layer in bench.layers],
        bench.layers,
        bench.task.choices,
        bench.task.budget,
    )
