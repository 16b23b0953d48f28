"""The same bits everywhere."""

from __future__ import annotations

from tap_eval.allocation.budget import most_uniform
from tap_eval.baselines.rule import Effort, Found, Rule
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BudgetMistake
from tap_eval.quantization.quantizer import Allocation

_LABEL = "uniform W"


def _find(bench: Bench, _: Effort) -> Found:
    """The most that the budget allows, whether they are among the choices or not; raises `BudgetMistake`."""
    choices, budget = bench.task.choices, bench.task.budget
    same = most_uniform(bench.layers, choices.activations, budget)
    if same is None:
        raise BudgetMistake(f"no bits that are the same everywhere are within {budget.text}.")
    note = "" if same.most in choices.weights else "these bits are not among the choices"
    return Found((same,), note=note, label=label_of(same))


def label_of(same: Allocation) -> str:
    """What a row of these bits is called."""
    return f"{_LABEL}{same.most}A{same.activations[0]}"


def rule_of(label: str) -> str:
    """What the bits of a row of that label were found by, whatever the budget."""
    return RULE.label if label.startswith(_LABEL) else label


RULE = Rule("uniform bits", "b_i = b", "fixed-precision quantization", (), _find, fast=True)
