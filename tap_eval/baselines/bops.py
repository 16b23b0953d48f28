"""Bit operations as a score of an allocation: the most that the budget allows."""

from __future__ import annotations

from tap_eval.baselines.rule import Effort, Found, Rule, by_operations, minimizing
from tap_eval.measuring.bench import Bench


def _find(bench: Bench, _: Effort) -> Found:
    return minimizing(bench, by_operations(bench.layers))


RULE = Rule("BOPs", "max sum_i macs_i bw_i ba_i", "a baseline of Dong et al. 2023, arXiv:2307.10554", (), _find)
