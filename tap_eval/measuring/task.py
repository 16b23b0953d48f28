"""What a network is to be fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tap_eval.allocation.budget import Budget, check_feasible
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.latency import Latencies
from tap_eval.mistake import BudgetMistake
from tap_eval.preparing.layers import Layer
from tap_eval.proxies.features import Inputs
from tap_eval.quantization.ranges import RangeRule
from tap_eval.quantization.rounding import Rounding
from tap_eval.quantization.sums import SumsIn

Attention = Literal["8", "off"]


@dataclass(frozen=True)
class Task:
    """The bits to choose from, the budget, and how weights are rounded.

    A bench's own has the budget `beside` what stays in float32 of its network.
    """

    choices: Choices
    budget: Budget
    inputs: Inputs = "statistics"
    rounding: Rounding = "gptq"
    finish: bool = True
    """whether networks of the final table are rounded once more, each for its allocation"""
    sums: SumsIn = "int8"
    ranges: RangeRule = field(default="minmax", repr=False)
    """how ranges of activations are chosen; keys have it from `Bench.rounded_by`"""
    attention: Attention = field(default="8", repr=False)
    """whether the operands of products of two activations are in 8 bits, likewise"""
    latencies: Latencies | None = None
    """of the layers, for budgets in time"""

    def fitted(self, budget: Budget, layers: Sequence[Layer], name: str) -> Task:
        """With a `budget`, which is `beside` what stays in float32 of the network called `name`, of these layers.

        Raises `BudgetMistake` when it cannot be met.
        """
        try:
            check_feasible(layers, self.choices, budget)
        except BudgetMistake as mistake:
            raise BudgetMistake(f"{name}: {mistake}") from mistake
        return replace(self, budget=budget)
