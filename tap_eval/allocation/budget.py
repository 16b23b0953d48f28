"""The budget: a limit on the size of weights, on the whole network, on bit operations or on time, never exceeded."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Literal

from tap_eval.allocation.choices import Choices, uniform
from tap_eval.allocation.latency import PICOSECONDS, Latencies
from tap_eval.allocation.size import INPUT, fixed_bytes, is_mixed, over_channels, row_bytes
from tap_eval.mistake import BudgetMistake
from tap_eval.preparing.layers import Layer
from tap_eval.quantization.quantizer import Allocation, LayerBits
from tap_eval.quantization.sums import NONE, Ranged

BUDGETS = "3bit, 87%, 0.1MB, 1.2GBOPs or 2ms"
_FORM = re.compile(r"\s*([0-9]{0,18}\.?[0-9]{1,18})\s*(?:(bits?)|(%)|([KMGT]?i?)(BOPs|B)|([um]?)(s))\s*", re.IGNORECASE)
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_PREFIX = {prefix.upper(): factor for prefix, factor in (_DECIMAL | _BINARY).items()}
_TIME = {"u": PICOSECONDS // 1000, "m": PICOSECONDS, "": PICOSECONDS * 1000}
_DIGITS = 4
"""of the smallest budget that a refusal names"""


@dataclass(frozen=True)
class Budget:
    """A limit as the user wrote it: on the size of weights, the whole packed network, bit operations or time an image.

    In average bits and in per cent it is about the bits of weights alone; in bytes about everything that
    `tap_eval.allocation.size.Size` counts; in seconds about the sum of the layers' latencies.
    """

    text: str
    unit: Literal["bit", "%", "B", "BOPs", "s"]
    amount: Fraction
    """exactly as written, so that a limit is not a bit off; of time in picoseconds"""
    rest: int = 0
    """bytes of the network that no layer holds and that stay in float32, which a budget in bytes is about too"""
    sums: Ranged = NONE
    """values that are rounded between layers, whose scales count likewise"""
    latencies: Latencies | None = None
    """without which no layer's time is known"""

    @staticmethod
    def parse(text: str) -> Budget:
        """Reads `3bit`, `87%` (smaller than float32 by that much), `0.1MB`, `1.2GBOPs` or `2ms`."""
        match = _FORM.fullmatch(text)
        if not match:
            raise BudgetMistake(f"'{text}' is no budget: give one like {BUDGETS}.")
        amount, bits, percent, prefix, unit, part, second = match.groups()
        value = Fraction(amount)
        if bits:
            return Budget(text.strip(), "bit", value)
        if percent:
            return Budget(text.strip(), "%", value)
        if second:
            return Budget(text.strip(), "s", value * _TIME[part.lower()])
        factor = _PREFIX.get(prefix.upper())
        if factor is None:
            raise BudgetMistake(f"'{text}' is no budget: give one like {BUDGETS}.")
        if unit == "b" and prefix[:1].isupper():
            raise BudgetMistake(f"'{text}' may be bits or bytes: give {amount}{prefix}B for bytes.")
        return Budget(text.strip(), "BOPs" if unit.lower() == "bops" else "B", value * factor)

    @staticmethod
    def parse_all(text: str) -> list[Budget]:
        """Reads several, divided by commas; each once, in their order."""
        return [Budget.parse(part) for part in dict.fromkeys(part.strip() for part in text.split(","))]

    def times(self, factor: Fraction) -> Budget:
        """About `factor` times as much, as a user would write it; of a rate in per cent, of what it leaves."""
        if self.unit == "%":
            return Budget.parse(f"{_rounded(max(100 - (100 - self.amount) * factor, Fraction(0)), ROUND_CEILING)}%")
        if self.unit == "bit":
            return Budget.parse(f"{_rounded(self.amount * factor, ROUND_FLOOR)}bit")
        return Budget.parse(_with_prefix(self.amount * factor, self, ROUND_FLOOR))

    @property
    def about(self) -> str:
        """What is limited, in words."""
        about = {"B": "the whole packed network", "BOPs": "operations an image", "s": "latency an image"}
        return about.get(self.unit, "weights alone")

    def beside(self, rest: int, sums: Ranged = NONE, latencies: Latencies | None = None) -> Budget:
        """The same for a network of which `rest` bytes stay in float32, with `sums` between layers and `latencies`."""
        return replace(self, rest=rest, sums=sums, latencies=latencies)

    def limit(self, layers: Sequence[Layer]) -> int:
        """The most that the bits of `layers` may cost: bits of weights, bytes of rows and of channels' bits, BOPs, ps.

        Of a budget in bytes, what is there at any bits is taken off, so that little may be left, or less than nothing.
        """
        params = sum(layer.params for layer in layers)
        exact = {
            "bit": self.amount * params,
            "%": (100 - self.amount) * 32 * params / 100,
            "B": self.amount - self._fixed(layers),
            "BOPs": self.amount,
            "s": self.amount,
        }[self.unit]
        return math.floor(exact)

    def _fixed(self, layers: Sequence[Layer]) -> int:
        return fixed_bytes(layers, self.rest + INPUT * self.sums.own)

    def options(self, layer: Layer, choices: Choices) -> list[tuple[int, int]]:
        """The (weight, activation) bits that `layer` may take, the cheapest first."""
        options = choices.of(layer)
        if self.unit == "s":  # fewer bits need not be faster
            weight, activation = min(options, key=lambda bits: self.cost(layer, *bits))
            return sorted(options, key=lambda bits: (bits[0] != weight, bits[0], bits[1] != activation, bits[1]))
        return sorted(options, key=lambda bits: (bits[0], -bits[1])) if self.unit == "B" else options

    def cost(self, layer: Layer, weight_bits: LayerBits, activation_bits: int) -> int:
        """What `layer`, or so many of its channels, take of the limit.

        params * bits; of a budget in bytes those of the packed rows; of BOPs macs * weight bits * activation bits; of
        time what was measured, in picoseconds. Raises `BudgetMistake` where that is not known.
        """
        if self.unit == "s":
            if not self.latencies:
                raise BudgetMistake(f"a budget of {self.text} needs the latencies of layers: give --latencies FILE.")
            return self.latencies.of(layer, weight_bits, activation_bits)
        if self.unit == "BOPs":
            return over_channels(layer.macs, layer, weight_bits) * activation_bits
        if self.unit == "B":
            return row_bytes(layer, weight_bits)
        return over_channels(layer.params, layer, weight_bits)

    def weights_limit(self, layers: Sequence[Layer], bits: Sequence[int], activation_bits: int) -> int:
        """Bits of weights with which `layers` are within a budget in bytes, whichever of `bits` each takes.

        As many as there is room for when every row has the most padding that `bits` lead to, and inputs these bits.
        """
        rows = [(layer.out_channels, layer.params // layer.out_channels) for layer in layers]
        padding = sum(count * max(-row * each % 8 for each in bits) for count, row in rows)
        ranges = sum(self.range_cost(layer, activation_bits) for layer in layers)
        return max(8 * (self.limit(layers) - ranges) - padding, 0)

    def mixing_cost(self, layer: Layer) -> int:
        """What `layer` takes on top where its channels differ in bits: of a budget in bytes, a byte a channel."""
        return layer.out_channels if self.unit == "B" else 0

    def range_cost(self, layer: Layer, activation_bits: int) -> int:
        """What `layer` takes on top for what shares the range of its input: of a budget in bytes, other scales."""
        return INPUT * self.sums.apart(layer.index, activation_bits) if self.unit == "B" else 0


def check_feasible(layers: Sequence[Layer], choices: Choices, budget: Budget) -> None:
    """Raises `BudgetMistake` when even the cheapest allocation is above the budget; it names one that would do."""
    cheapest = [budget.options(layer, choices)[0] for layer in layers]
    least = spent(Allocation(*zip(*cheapest, strict=True)), layers, budget)
    if least > budget.limit(layers):
        steps = ["raise the budget"]
        if budget.unit == "s":
            steps.append("give other --bits")
        elif min(choices.weights) > 2:
            steps.append("allow fewer bits with --bits")
        if budget.unit in ("BOPs", "s") and min(choices.activations) > 2:
            steps.append("allow fewer with --activation-bits")
        if choices.pin_ends:
            steps.append("leave out --pin-ends")
        which = "fastest" if budget.unit == "s" else "smallest"
        raise BudgetMistake(
            f"a budget of {budget.text} is below what the {which} bits need, {_written(least, layers, budget)}: "
            f"{' or '.join(steps)}."
        )


def _written(least: int, layers: Sequence[Layer], budget: Budget) -> str:
    """The tightest budget of a few digits, in the unit of `budget`, whose limit is `least` or more."""
    params = sum(layer.params for layer in layers)
    if budget.unit == "bit":
        return f"{_rounded(Fraction(least, params), ROUND_CEILING)}bit"
    if budget.unit == "%":
        return f"{_rounded(100 - Fraction(100 * least, 32 * params), ROUND_FLOOR)}%"
    amount = Fraction(least + (budget._fixed(layers) if budget.unit == "B" else 0))
    return _with_prefix(amount, budget, ROUND_CEILING)


def _with_prefix(amount: Fraction, like: Budget, rounding: str) -> str:
    """Of a few digits, in the unit of another and with prefixes of its kind."""
    binary = like.text.lower().removesuffix(like.unit.lower()).endswith("i")
    prefixes = _TIME if like.unit == "s" else _BINARY if binary else _DECIMAL
    prefix = [each for each, factor in prefixes.items() if factor <= amount or each == next(iter(prefixes))][-1]
    return f"{_rounded(amount / prefixes[prefix], rounding)}{prefix}{like.unit}"


def _rounded(amount: Fraction, rounding: str) -> str:
    exact = Decimal(amount.numerator), Decimal(amount.denominator)
    return f"{Context(_DIGITS, rounding).divide(*exact).normalize():f}"


def spent(allocation: Allocation, layers: Sequence[Layer], budget: Budget) -> int:
    """What `allocation` takes of `budget.limit(layers)`."""
    mixed = (layer for layer, bits in zip(layers, allocation.weights, strict=True) if is_mixed(bits))
    return (
        sum(map(budget.cost, layers, allocation.weights, allocation.activations))
        + sum(map(budget.mixing_cost, mixed))
        + sum(map(budget.range_cost, layers, allocation.activations))
    )


def most_uniform(layers: Sequence[Layer], activations: Collection[int], budget: Budget) -> Allocation | None:
    """The most equal weight bits, from 8 down to 2, that `budget` allows; None where none are.

    Inputs have the most of the bits of `activations` beside which there are any.
    """
    for activation, bits in itertools.product(sorted(activations, reverse=True), range(8, 1, -1)):
        same = uniform(layers, bits, activation)
        if budget.unit == "s" and budget.latencies and budget.latencies.total(layers, same) is None:
            continue
        if spent(same, layers, budget) <= budget.limit(layers):
            return same
    return None


def check_within(allocation: Allocation, layers: Sequence[Layer], budget: Budget) -> None:
    """Raises `BudgetMistake` when `allocation` is above the budget, by however little."""
    over = spent(allocation, layers, budget) - budget.limit(layers)
    if over > 0:
        unit = {"BOPs": "bit operations", "B": "bytes", "s": "ms"}.get(budget.unit, "bits of weights")
        amount = f"{over / PICOSECONDS:.3g}" if budget.unit == "s" else f"{over:,}"
        raise BudgetMistake(f"the allocation is {amount} {unit} above the budget of {budget.text}.")
