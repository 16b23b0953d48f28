"""Scores drawn at random, in the mean of a few: what the allocator alone is worth."""

from __future__ import annotations

import random

from tap_eval.baselines.rule import Effort, Found, Rule, by_scores, least
from tap_eval.measuring.bench import Bench

_COUNT, _OF_LARGE = 5, 3
_LARGE = 10**7
"""weights from which a network takes so long to be finished that fewer random allocations of it are measured"""


def _find(bench: Bench, effort: Effort) -> Found:
    rng = random.Random(effort.seed)
    count = _OF_LARGE if sum(layer.params for layer in bench.layers) >= _LARGE else _COUNT
    drawn = tuple(least(bench, by_scores([rng.random() for _ in bench.layers])) for _ in range(count))
    return Found(drawn, note=f"mean of {count}")


RULE = Rule("random scores", "s_i uniform in [0, 1]", "a control of ours", (), _find, fast=True)
