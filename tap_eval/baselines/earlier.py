"""The earlier a layer, the more bits: errors of early layers go through all others."""

from __future__ import annotations

from tap_eval.baselines.rule import Effort, Found, Rule, by_scores, minimizing
from tap_eval.measuring.bench import Bench


def _find(bench: Bench, _: Effort) -> Found:
    return minimizing(bench, by_scores([-float(layer.index) for layer in bench.layers]))


RULE = Rule("earlier layers get more", "s_i = -i", "a control of ours", (), _find, fast=True)
