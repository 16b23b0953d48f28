"""What a network is to be fitted to."""

from __future__ import annotations

from dataclasses import dataclass

from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.proxies.features import Inputs
from tap_eval.quantization.rounding import Rounding
from tap_eval.quantization.sums import SumsIn


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
