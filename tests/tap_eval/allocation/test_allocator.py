"""Budgets that are never exceeded, and allocations that are exact."""

from __future__ import annotations

import itertools
import random

import pytest

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget, spent
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.score import importance
from tap_eval.allocation.size import bops, weight_size
from tap_eval.mistake import BitsMistake
from tap_eval.quantization.quantizer import Allocation
from tests.tap_eval.allocation.layers import make_layers

LAYERS = make_layers(40, 120, 400, 800, 80)


@pytest.mark.parametrize("bits", [(), (1, 2), (2, 9), (2, 2)])
def test_bits_outside_the_choices_are_named(bits: tuple[int, ...]) -> None:
    with pytest.raises(BitsMistake, match="whole numbers from 2 to 8"):
        Choices(bits)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", ["3bit", "0.5KB", "85%", "0.4MBOPs"])
def test_no_allocation_within_the_budget_costs_less(seed: int, budget: str) -> None:
    rng = random.Random(seed)
    scores = [rng.random() for _ in LAYERS]
    choices, limit = Choices((2, 3, 4, 8)), Budget.parse(budget)
    weights = importance(scores)

    def loss(bits: tuple[int, ...]) -> float:
        return sum(weight * 4.0**-each for weight, each in zip(weights, bits, strict=True))

    every = itertools.product((2, 3, 4, 8), repeat=len(LAYERS))
    fitting = [bits for bits in every if spent(Allocation(bits, (8,) * 5), LAYERS, limit) <= limit.limit(LAYERS)]
    found = allocate(scores, LAYERS, choices, limit)
    assert loss(found.weights) == pytest.approx(min(map(loss, fitting)), rel=1e-9)  # type: ignore[arg-type]


def test_activations_share_a_budget_of_bit_operations() -> None:
    budget = Budget.parse("0.4MBOPs")
    found = allocate([5, 1, 3, 2, 4], LAYERS, Choices((2, 4, 8), (2, 4, 8)), budget)
    assert len(set(found.activations)) > 1
    assert bops(LAYERS, found) <= 400_000


def test_channels_of_like_scores_take_bits_together() -> None:
    layers = make_layers(400, 400, channels=40)
    scores = [[float(channel % 4 + 1) ** 3 for channel in range(40)], [25.0] * 40]
    budget = Budget.parse("3bit")
    found = allocate(scores, layers, Choices(channel_groups=4), budget)
    bits = found.weights[0]
    assert isinstance(bits, tuple)
    assert [len({bits[channel] for channel in range(start, 40, 4)}) for start in range(4)] == [1] * 4
    assert list(bits[:4]) == sorted(bits[:4])
    assert weight_size(layers, found) <= budget.limit(layers)
    assert (
        allocate(scores, layers, Choices(), budget).weights == allocate([25.0, 25.0], layers, Choices(), budget).weights
    )


def test_groups_of_a_layer_share_their_activation_bits() -> None:
    layers = make_layers(400, 400, channels=8)
    scores = [[float(channel + 1) for channel in range(8)] for _ in layers]
    budget = Budget.parse("0.1MBOPs")
    found = allocate(scores, layers, Choices((2, 4, 8), (2, 4, 8), channel_groups=4), budget)
    assert bops(layers, found) <= 100_000


def test_pinned_ends_keep_the_most_bits() -> None:
    found = allocate([1, 2, 3, 4, 5], LAYERS, Choices(pin_ends=True), Budget.parse("3bit"))
    assert (found.weights[0], found.weights[-1]) == (8, 8)
    assert weight_size(LAYERS, found) <= 3 * 1440


@pytest.mark.parametrize(
    "scores", [[1e-300, 1, 1e300], [-5, -1, 0], [-1e300, 0, 1e308], [1, 1.0001, 1.0002], [0, 0, 1e-300]]
)
def test_every_score_means_its_ranking(scores: list[float]) -> None:
    weights = importance(scores)
    assert list(weights) == sorted(weights)
    assert weights.min() > 0
    assert weights.max() / weights.min() < 1e6


def test_a_common_factor_changes_nothing() -> None:
    scores = [0.3, 2.0, 7.0, 0.01, 1.0]
    assert importance(scores) == pytest.approx(importance([1000 * score for score in scores]))
