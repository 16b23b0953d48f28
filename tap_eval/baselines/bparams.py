"""The size of the weights as a score of an allocation: the largest that the budget allows.

Within a budget of size all that fill it score alike, so that it says little; within one of operations it gives bits to
layers with many weights an operation.
"""

from __future__ import annotations

from tap_eval.baselines.rule import Effort, Found, Rule, by_gains, minimizing
from tap_eval.measuring.bench import Bench


def _find(bench: Bench, _: Effort) -> Found:
    return minimizing(bench, by_gains([layer.params for layer in bench.layers]))


RULE = Rule(
    "BParams", "max sum_i b_i n_i / 8 / 2^20", "a baseline of Dong et al. 2023, arXiv:2307.10554", (), _find
)  # fmt: skip
