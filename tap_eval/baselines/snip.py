"""bit-SNIP: bits by how much the loss depends on whether the weights of a layer are there."""

from __future__ import annotations

from torch import Tensor

from tap_eval.baselines.gradients import Network
from tap_eval.baselines.rule import Cost, Effort, Found, Rule, by_gains, minimizing
from tap_eval.measuring.bench import Bench

_VERSION = 1


def score(weight: Tensor, gradient: Tensor) -> float:
    """sum |dL/dm| of one layer, by a mask m of ones on its weights: |g w|."""
    return float((gradient * weight).abs().double().sum())


def scores(bench: Bench) -> list[float]:
    """Of each layer, by the mean cross entropy of the calibration images."""
    network = Network(bench)
    return network.scores(network.cross_entropy, score)


def _find(bench: Bench, _: Effort) -> Found:
    found, seconds = bench.once(["snip", _VERSION], lambda: scores(bench))
    return minimizing(bench, by_gains(found), Cost(len(bench.splits.calibrations[0]), 1, seconds))


RULE = Rule(
    "bit-SNIP", "max sum_i b_i sum|dL/dW_i W_i|", "Lee et al. 2019, arXiv:1810.02340, with bits as in arXiv:2307.10554",
    ("weights", "images", "labels", "gradients"), _find,
)  # fmt: skip
