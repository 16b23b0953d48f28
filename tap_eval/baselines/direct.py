"""Evolution over the allocations of one network themselves, with as many measurements as a search has.

It sees what a proxy may not, measured divergences, and what it finds is of no use to another network or budget.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from tap_eval.allocation.allocator import allocate
from tap_eval.baselines.rule import Effort, Found, Rule, searched
from tap_eval.measuring.bench import Bench
from tap_eval.quantization.quantizer import VERSION, Allocation, LayerBits

_VERSION = 2
_PARENTS = 4
_START = 1.0
"""standard deviation of the first scores: of nats, of which `ln 4` are a bit"""
_STEP, _MOVED = 0.7, 0.3
"""of a change, and the share of layers that it touches"""
_TRIES = 50
"""at a change that gives other bits than all before"""


class Search(NamedTuple):
    """What a search over allocations found, and by how many measured ones."""

    best: Allocation
    measured: int
    kept: bool
    """whether some of them were measured before"""


def direct(bench: Bench, count: int, seed: int) -> Search:
    """The best of up to `count` measured allocations of layers by mean KL divergence on the images that candidates
    see; there are fewer where none is found any more that is new."""
    rng, layers, kept = random.Random(seed), bench.layers, False
    known: dict[Allocation, tuple[float, list[float]]] = {}
    for number in range(count):
        for _ in range(_TRIES):
            if number < 2 * _PARENTS:
                scores = [rng.gauss(0, _START) for _ in layers]
            else:
                best = sorted(known.values())[:_PARENTS]
                scores = [
                    score + (rng.gauss(0, _STEP) if rng.random() < _MOVED else 0.0) for score in rng.choice(best)[1]
                ]
            allocation = allocate(_positive(scores), layers, bench.task.choices, bench.task.budget)
            if allocation not in known:
                break
        else:
            break
        kept = kept or bench.was_seen(allocation)
        known[allocation] = bench.searched(allocation).kl, scores
    return Search(min(known, key=lambda each: known[each][0]), len(known), kept)


def _positive(scores: list[float]) -> list[float]:
    """As what the allocator takes the logarithm of."""
    return [4.0 ** (score / 2) for score in scores]


def _find(bench: Bench, effort: Effort) -> Found:
    count, seed = effort.measurements, effort.seed

    def compute() -> tuple[tuple[LayerBits, ...], tuple[int, ...], int, bool]:
        found = direct(bench, count, seed)
        return found.best.weights, found.best.activations, found.measured, found.kept

    what = ["direct", _VERSION, count, seed, VERSION, str(bench.task), bench.splits.search.digest, *bench.rounded_by]
    (weights, activations, measured, kept), seconds = bench.once(what, compute, rounded=True)
    return searched(bench, Allocation(tuple(weights), tuple(activations)), measured, seconds, kept)


RULE = Rule(
    "search over allocations", "min KL(p || p with b), b by evolution", "a control of ours", ("measured errors",),
    _find, searches=True,
)  # fmt: skip
