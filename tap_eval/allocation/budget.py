"""The budget: a limit on the size of weights or on bit operations, which is never exceeded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tap_eval.allocation.choices import Choices
from tap_eval.allocation.size import over_channels
from tap_eval.mistake import BudgetMistake
from tap_eval.networks.layers import Layer
from tap_eval.quantization.quantizer import Allocation, LayerBits

BUDGETS = "3bit, 87%, 0.1MB or 1.2GBOPs"
_PREFIX = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class Budget:
    """A limit on weight size (in bits) or on bit operations an image, as the user wrote it."""

    text: str
    unit: Literal["bit", "%", "B", "BOPs"]
    amount: float

    @staticmethod
    def parse(text: str) -> Budget:
        """Reads `3bit`, `87%` (smaller than float32 by that much), `0.1MB` or `1.2GBOPs`."""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:(bits?)|(%)|([KMGT]?i?)(BOPs|B))\s*", text, re.IGNORECASE)
        if not match:
            raise BudgetMistake(f"'{text}' is no budget: give one like {BUDGETS}.")
        amount, bits, percent, prefix, unit = match.groups()
        value = float(amount)
        if bits:
            return Budget(text.strip(), "bit", value)
        if percent:
            return Budget(text.strip(), "%", value)
        factor = _PREFIX.get(prefix.upper())
        if factor is None:
            raise BudgetMistake(f"'{text}' is no budget: give one like {BUDGETS}.")
        return Budget(text.strip(), "BOPs" if unit.lower() == "bops" else "B", value * factor)

    def limit(self, layers: Sequence[Layer]) -> int:
        """The most bits of weights, or for BOPs the most bit operations, that `layers` may take."""
        params = sum(layer.params for layer in layers)
        exact = {
            "bit": self.amount * params,
            "%": (1 - self.amount / 100) * 32 * params,
            "B": self.amount * 8,
            "BOPs": self.amount,
        }[self.unit]
        return math.floor(exact + 1e-6)

    def cost(self, layer: Layer, weight_bits: LayerBits, activation_bits: int) -> int:
        """What `layer` takes of the limit: params * bits, or macs * weight bits * activation bits."""
        if self.unit == "BOPs":
            return over_channels(layer.macs, layer, weight_bits) * activation_bits
        return over_channels(layer.params, layer, weight_bits)


def check_feasible(layers: Sequence[Layer], choices: Choices, budget: Budget) -> None:
    """Raises `BudgetMistake` when even the cheapest allocation is above the budget."""
    least = sum(budget.cost(layer, *choices.of(layer)[0]) for layer in layers)
    if least > budget.limit(layers):
        unit = {"bit": sum(layer.params for layer in layers), "B": 8, "BOPs": 1}
        smallest = (
            f"{100 * (1 - least / 32 / unit['bit']):.2f}%"
            if budget.unit == "%"
            else f"{least / unit[budget.unit]:,.6g} {'bit' if budget.unit == 'bit' else budget.unit}"
        )
        raise BudgetMistake(
            f"a budget of {budget.text} is below what the smallest bits need, {smallest}: "
            "raise the budget or allow fewer bits with --bits."
        )


def spent(allocation: Allocation, layers: Sequence[Layer], budget: Budget) -> int:
    """What `allocation` takes of `budget.limit(layers)`."""
    return sum(map(budget.cost, layers, allocation.weights, allocation.activations))


def check_within(allocation: Allocation, layers: Sequence[Layer], budget: Budget) -> None:
    """Raises `BudgetMistake` when `allocation` is above the budget, by however little."""
    over = spent(allocation, layers, budget) - budget.limit(layers)
    if over > 0:
        unit = "bit operations" if budget.unit == "BOPs" else "bits of weights"
        raise BudgetMistake(f"the allocation is {over:,} {unit} above the budget of {budget.text}.")
