"""The measured error of each layer as its score: of the network's outputs, when it alone has the lowest bits."""

from __future__ import annotations

from tap_eval.baselines.rule import Cost, Effort, Found, Rule, by_ratios, minimizing
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.layer_errors import enough


def _find(bench: Bench, _: Effort) -> Found:
    lowest = min(bench.task.choices.weights)
    cost = Cost(enough(bench.splits.search), len(bench.layers), bench.layer_errors_at(lowest).seconds, True)
    return minimizing(bench, by_ratios(bench.layer_errors), cost, "sees what a proxy may not")


RULE = Rule(
    "measured layer error", "s_i = KL(p || p with layer i alone at the lowest bits)",
    "what a proxy is ranked by in TAP's Eq. 6", ("measured errors",), _find, fast=True,
)  # fmt: skip
