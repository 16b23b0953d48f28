"""Budgets as people write them, and what a refusal advises."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget, check_feasible, check_within
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.allocation.size import packed_size
from tap_eval.mistake import BudgetMistake
from tap_eval.preparing.layers import Layer
from tap_eval.quantization.quantizer import Allocation
from tests.tap_eval.allocation.layers import make_layers

LAYERS = make_layers(40, 120, 400, 800, 80)
FIXED = 5 * (4 * 4 + 4 * 4 + 5)
"""bytes of scales, biases and inputs' scales and zero points of five layers with four channels each"""


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("3bit", 3 * 1440), ("2.5 bits", 3600), ("90%", 4608), ("512B", 512 - FIXED), ("0.5KB", 500 - FIXED),
        ("0.5KiB", 512 - FIXED), ("1e3B", None), ("1MBOPs", 10**6), ("0.25GBOPs", 250 * 10**6),
    ],
)  # fmt: skip
def test_a_budget_is_read_as_people_write_it(text: str, limit: int | None) -> None:
    if limit is None:
        with pytest.raises(BudgetMistake, match="3bit, 87%"):
            Budget.parse(text)
    else:
        assert Budget.parse(text).limit(LAYERS) == limit


@pytest.mark.parametrize("text", ["", "3", "bit", "-3bit", "three bit", "3 bytes", "5XB"])
def test_what_is_no_budget_is_named(text: str) -> None:
    with pytest.raises(BudgetMistake, match=f"'{text}' is no budget"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["4Mb", "0.5Kib", "1Gb"])
def test_bits_that_may_be_meant_for_bytes_are_refused(text: str) -> None:
    with pytest.raises(BudgetMistake, match=f"'{text}' may be bits or bytes: give {text[:-1]}B for bytes"):
        Budget.parse(text)
    assert Budget.parse(text.lower()).unit == "B"


@pytest.mark.parametrize("params", [10**9 + 7, 10**12 + 39])
def test_a_limit_is_not_a_bit_off_however_large_the_network(params: int) -> None:
    assert Budget.parse("93.75%").limit(make_layers(params)) == 2 * params
    assert Budget.parse("2.3bit").limit(make_layers(10 * params)) == 23 * params


def random_network(rng: random.Random) -> list[Layer]:
    """One to sixty layers of very different sizes, whose operations do not follow them."""
    layers = make_layers(*[1] * rng.choice((1, 2, 5, 20, 60)))
    sizes = [(rng.randint(1, 600), rng.randint(1, rng.choice((9, 9_000)))) for _ in layers]
    return [
        replace(layer, out_channels=out, params=out * each, macs=out * each * rng.randint(1, 50_000))
        for layer, (out, each) in zip(layers, sizes, strict=True)
    ]


def smallest(layers: list[Layer], choices: Choices, text: str, rest: int = 0) -> str:
    """What the refusal of the budget `text` names where `rest` bytes stay in float32."""
    with pytest.raises(BudgetMistake) as refusal:
        check_feasible(layers, choices, Budget.parse(text).beside(rest))
    found = re.search(r"below what the smallest bits need, (\S+): raise the budget", str(refusal.value))
    assert found
    return found[1]


@pytest.mark.parametrize("unit", ["bit", "%", "B", "KB", "MB", "KiB", "GiB", "BOPs", "MBOPs", "GBOPs"])
@pytest.mark.parametrize("pin_ends", [False, True])
@pytest.mark.parametrize("bits", [(2, 4, 8), (3, 8), (8,)])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_smallest_budget_that_a_refusal_names_is_accepted(
    unit: str, pin_ends: bool, bits: tuple[int, ...], groups: int
) -> None:
    rng = random.Random(f"{unit} {pin_ends} {bits} {groups}")
    for _ in range(20):
        layers = random_network(rng)
        choices = Choices(bits, rng.choice([(8,), (4, 8)]), pin_ends, groups)
        rest = rng.choice((0, 4 * rng.randint(1, 100_000)))
        said = smallest(layers, choices, "99.99999%" if unit == "%" else f"0.000000000001{unit}", rest)
        number = re.match(r"[0-9.]+", said)
        assert number
        assert len(number[0]) <= 6
        budget = Budget.parse(said).beside(rest)
        check_feasible(layers, choices, budget)
        if budget.unit == "B":
            found = allocate([1.0] * len(layers), layers, choices, budget)
            assert packed_size(layers, found, rest).total <= budget.amount
        step = Decimal(10) ** (Decimal(number[0]).adjusted() - 3)
        tighter = Decimal(number[0]) + (step if unit == "%" else -step)
        assert smallest(layers, choices, said.replace(number[0], f"{tighter:f}"), rest) == said


@pytest.mark.parametrize(
    ("choices", "text", "advice"),
    [
        (Choices(), "1.9bit", "2bit: raise the budget."),
        (Choices((4, 8)), "99.9%", "87.5%: raise the budget or allow fewer bits with --bits."),
        (Choices(pin_ends=True), "0.1KiB", "637B: raise the budget or leave out --pin-ends."),
        (Choices(activations=(4, 8)), "1BOPs", "115.2KBOPs: raise the budget or allow fewer with --activation-bits."),
    ],
)
def test_a_refusal_advises_what_helps(choices: Choices, text: str, advice: str) -> None:
    with pytest.raises(BudgetMistake, match="below what the smallest bits need") as refusal:
        check_feasible(LAYERS, choices, Budget.parse(text))
    assert str(refusal.value).endswith(advice)


def test_above_the_budget_by_one_bit_is_above_it() -> None:
    layers = make_layers(1, 1, channels=1)
    check_within(Allocation((2, 4), (8, 8)), layers, Budget.parse("3bit"))
    with pytest.raises(BudgetMistake, match="1 bits of weights above"):
        check_within(Allocation((3, 4), (8, 8)), layers, Budget.parse("3bit"))


def test_a_budget_in_bytes_is_that_of_the_whole_packed_network() -> None:
    layers, same = make_layers(40, 120), uniform(make_layers(40, 120), 3)
    total = 4 * 4 + 4 * 12 + 8 * (4 + 4) + 2 * 5 + 100  # rows of 30 and 90 bits, scales and biases, inputs, the rest
    check_within(same, layers, Budget.parse(f"{total}B").beside(100))
    with pytest.raises(BudgetMistake, match=f"1 bytes above the budget of {total - 1}B"):
        check_within(same, layers, Budget.parse(f"{total - 1}B").beside(100))
    mixed = Allocation(((3, 3, 3, 3), (3, 3, 3, 2)), (8, 8))  # a row of 60 bits, and a byte for each of four channels
    check_within(mixed, layers, Budget.parse(f"{total}B").beside(100))
    with pytest.raises(BudgetMistake, match="1 bytes above"):
        check_within(mixed, layers, Budget.parse(f"{total - 1}B").beside(100))


@pytest.mark.parametrize(
    ("text", "more"),
    [("3bit", "3.6bit"), ("90%", "88%"), ("0.1MB", "120KB"), ("64KiB", "76.8KiB"), ("1.2GBOPs", "1.44GBOPs")],
)
def test_a_budget_a_fifth_above_another_is_written_as_people_write_it(text: str, more: str) -> None:
    budget = Budget.parse(text).times(Fraction(6, 5))
    assert budget == Budget.parse(more)
    assert Budget.parse_all(f"{text}, {more},{text}") == [Budget.parse(text), budget]


def test_a_rate_that_leaves_nearly_all_leaves_no_more_than_all() -> None:
    assert Budget.parse("10%").times(Fraction(6, 5)) == Budget.parse("0%")
