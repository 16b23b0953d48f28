"""The least sum of measured errors: of the network's outputs, with each layer alone at each of its bits.

It takes for granted that the errors of layers add up.
"""

from __future__ import annotations

from tap_eval.baselines.rule import Cost, Effort, Found, Rule, by_losses, minimizing
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.layer_errors import enough


def _find(bench: Bench, _: Effort) -> Found:
    choices = bench.task.choices.weights
    tables = {bits: bench.layer_errors_at(bits) for bits in choices}
    losses = [{bits: tables[bits].value[layer.index] for bits in choices} for layer in bench.layers]
    steps, seconds = len(choices) * len(bench.layers), sum(table.seconds for table in tables.values())
    return minimizing(bench, by_losses(losses), Cost(enough(bench.splits.search), steps, seconds, True))


RULE = Rule(
    "measured errors of all bits", "min sum_i KL(p || p with layer i alone at b_i)", "ours", ("measured errors",), _find
)
