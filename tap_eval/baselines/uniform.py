"""The same bits everywhere."""

from __future__ import annotations

from tap_eval.allocation.budget import most_uniform
from tap_eval.baselines.rule import Effort, Found, Rule
from tap_eval.measuring.bench import Bench


def _find(bench: Bench, _: Effort) -> Found:
    """The most that the budget allows, whether they are among the choices or not; none where 2 are too many."""
    activation = max(bench.task.choices.activations)
    same = most_uniform(bench.layers, activation, bench.task.budget)
    if same is None:
        return Found(())
    note = "" if same.most in bench.task.choices.weights else "these bits are not among the choices"
    return Found((same,), note=note, label=f"uniform W{same.most}A{activation}")


RULE = Rule("uniform bits", "b_i = b", "fixed-precision quantization", (), _find, fast=True)
