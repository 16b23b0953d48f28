"""The best of 1,000 random allocations by measured divergence on the images that candidates are compared on.

All are measured on the first of these images, a twentieth of the search split, and the best tenth on the others too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tap_eval.baselines.rule import Effort, Found, Rule, by_scores, least, searched
from tap_eval.measuring.accuracy import Measurement
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import key
from tap_eval.measuring.stages import STAGES
from tap_eval.quantization.quantizer import VERSION, Allocation

_VERSION = 2
COUNT, _SHARE = 1000, 10
_FIRST = STAGES.index(0.05) + 1
_TRIES = 100
"""without a new allocation, after which there are taken to be no more: a small network has fewer"""


def drawn(bench: Bench, count: int, seed: int) -> list[Allocation]:
    """Different allocations by random scores, up to `count`."""
    rng = random.Random(seed)
    found: dict[Allocation, None] = {}
    tried = 0
    while len(found) < count and tried < _TRIES:
        before = len(found)
        found[least(bench, by_scores([rng.random() for _ in bench.layers]))] = None
        tried = tried + 1 if len(found) == before else 0
    return list(found)


def best(bench: Bench, allocations: Sequence[Allocation]) -> Allocation:
    """Of least mean divergence, measured as above."""
    first = _divergences(bench, allocations, _FIRST)
    order = sorted(range(len(allocations)), key=lambda place: first[place])
    left = [allocations[place] for place in order[: -(-len(order) // _SHARE)]]
    kls = _divergences(bench, left, len(STAGES))
    return left[kls.index(min(kls))]


def _divergences(bench: Bench, allocations: Sequence[Allocation], stages: int) -> list[float]:
    """The mean one (nats) of each, on the images of the first `stages`."""
    seen = [bench.seen_all(allocations, stage) for stage in range(stages)]
    return [Measurement.joined(each).mean_kl for each in zip(*seen, strict=True)]


def _find(bench: Bench, effort: Effort) -> Found:
    allocations = drawn(bench, COUNT, effort.seed)
    tried = key([[each.weights, each.activations] for each in allocations])

    def compute() -> tuple[int, bool]:
        kept = any(map(bench.was_seen, allocations))
        return allocations.index(best(bench, allocations)), kept

    what = [
        "best of random", _VERSION, tried, VERSION, str(bench.task), bench.splits.search.digest, *bench.rounded_by
    ]  # fmt: skip
    (place, kept), seconds = bench.once(what, compute, rounded=True)
    count = len(allocations)
    note = f"of {count:,} different ones"
    return searched(bench, allocations[place], passes(bench, count), seconds, kept, note)


def passes(bench: Bench, count: int) -> int:
    """As many as so many allocations take of all images that candidates are compared on, rounded up."""
    first = sum(map(len, bench.stages[:_FIRST]))
    images = count * first + -(-count // _SHARE) * (bench.compared - first)
    return -(-images // bench.compared)


RULE = Rule(
    f"best of {COUNT:,} random", "min KL(p || p with b), b of random scores", "a control of ours",
    ("measured errors",), _find, searches=True,
)  # fmt: skip
