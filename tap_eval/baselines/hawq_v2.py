"""HAWQ-V2: the least sum of weight perturbations, each times the mean trace of the loss's Hessian."""

from __future__ import annotations

from tap_eval.baselines.curvature import curvature, traces
from tap_eval.baselines.rule import Cost, Effort, Found, Rule, by_losses, minimizing
from tap_eval.measuring.bench import Bench


def perturbations(bench: Bench, effort: Effort) -> tuple[list[dict[int, float]], Cost, str]:
    """(Tr(H_i) / n_i) ||Q_b(W_i) - W_i||^2 of each layer by bits; a trace below 0 counts as 0, which is noted."""
    (found, steps), seconds = curvature(bench, "traces", traces, effort.seed)
    means = [max(trace, 0.0) / layer.params for trace, layer in zip(found, bench.layers, strict=True)]
    losses = [
        {bits: mean * error for bits, error in errors.items()}
        for mean, errors in zip(means, bench.weight_errors, strict=True)
    ]
    below = sum(trace < 0 for trace in found)
    note = f"the traces of {below} of {len(found)} layers are below 0 and count as 0" if below else ""
    return losses, Cost(len(bench.splits.calibrations[0]), steps, seconds), note


def _find(bench: Bench, effort: Effort) -> Found:
    losses, cost, note = perturbations(bench, effort)
    return minimizing(bench, by_losses(losses), cost, note)


RULE = Rule(
    "HAWQ-V2", "min sum_i Tr(H_i) / n_i ||Q_b(W_i) - W_i||^2", "Dong et al. 2020, arXiv:1911.03852",
    ("weights", "images", "labels", "Hessian"), _find,
)  # fmt: skip
