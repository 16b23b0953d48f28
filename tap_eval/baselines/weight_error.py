"""The least sum of squared weight errors, from the weights alone."""

from __future__ import annotations

from tap_eval.baselines.rule import Effort, Found, Rule, by_losses, minimizing
from tap_eval.measuring.bench import Bench


def _find(bench: Bench, _: Effort) -> Found:
    return minimizing(bench, by_losses(bench.weight_errors), note="least sum of squared weight errors")


RULE = Rule(
    "weight error", "min sum_i ||Q_b(W_i) - W_i||^2", "the weight quantization error of many papers", ("weights",),
    _find, fast=True,
)  # fmt: skip
