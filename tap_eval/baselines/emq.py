"""EMQ-style: weights by the share that they have in the gradient of the sum of logits for an image of ones.

The proxy that EMQ's search found is published as numbers of operators whose table is not. softmax(log |g|) times
sqrt(relu(w)), summed over a layer, is the likeliest reading, and no more than that; hence the name.
"""

from __future__ import annotations

from torch import Tensor

from tap_eval.baselines.gradients import Network
from tap_eval.baselines.rule import Cost, Effort, Found, Rule, by_gains, finite, minimizing
from tap_eval.measuring.bench import Bench

_VERSION = 1


def score(weight: Tensor, gradient: Tensor) -> float:
    """Of one layer; 0 where no gradient reaches it."""
    size = gradient.abs().double()
    total = float(size.sum())
    return float((size / total * weight.double().relu().sqrt()).sum()) if total else 0.0


def scores(bench: Bench) -> list[float]:
    """Of each layer."""
    network = Network(bench)
    return network.scores(network.sum_of_logits, score)


def _find(bench: Bench, _: Effort) -> Found:
    found, seconds = bench.once(["emq", _VERSION], lambda: scores(bench))
    finite(bench, found)
    return minimizing(bench, by_gains(found), Cost(0, 1, seconds), "our reading of its numbers; an image of ones")


RULE = Rule(
    "EMQ-style", "max sum_i b_i sum(softmax(log|g_i|) sqrt(relu(W_i)))", "after Dong et al. 2023, arXiv:2307.10554",
    ("weights", "gradients"), _find,
)  # fmt: skip
