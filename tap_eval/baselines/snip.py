"""bit-SNIP: bits by how much the loss depends on whether the weights of a layer are there."""

from __future__ import annotations

from tap_eval.baselines.gradients import Network, saliency
from tap_eval.baselines.rule import Cost, Effort, Found, Rule, by_gains, finite, minimizing
from tap_eval.measuring.bench import Bench

_VERSION = 1


def scores(bench: Bench) -> list[float]:
    """Of each layer, by the mean cross entropy of the calibration images."""
    network = Network(bench)
    return network.scores(network.cross_entropy, saliency)


def _find(bench: Bench, _: Effort) -> Found:
    found, seconds = bench.once(["snip", _VERSION], lambda: scores(bench))
    finite(bench, found)
    return minimizing(bench, by_gains(found), Cost(len(bench.splits.calibrations[0]), 1, seconds))


RULE = Rule(
    "bit-SNIP", "max sum_i b_i sum|dL/dW_i W_i|", "Lee et al. 2019, arXiv:1810.02340, with bits as in arXiv:2307.10554",
    ("weights", "images", "labels", "gradients"), _find,
)  # fmt: skip
