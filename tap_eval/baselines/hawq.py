"""HAWQ: layers ranked by the top eigenvalue of the loss's Hessian, a weight.

The paper chooses bits by hand along that order; here the score goes to the allocator, as a proxy's does.
"""

from __future__ import annotations

from tap_eval.baselines.curvature import curvature, top_eigenvalues
from tap_eval.baselines.rule import Cost, Effort, Found, Rule, by_ratios, minimizing
from tap_eval.measuring.bench import Bench


def _find(bench: Bench, effort: Effort) -> Found:
    (values, steps), seconds = curvature(bench, "eigenvalues", top_eigenvalues, effort.seed)
    scores = [abs(value) / layer.params for value, layer in zip(values, bench.layers, strict=True)]
    return minimizing(bench, by_ratios(scores), Cost(len(bench.splits.calibrations[0]), steps, seconds))


RULE = Rule(
    "HAWQ", "s_i = lambda_max(H_i) / n_i", "Dong et al. 2019, arXiv:1905.03696", ("images", "labels", "Hessian"), _find
)
