"""Budgets that are never exceeded, and allocations that are exact."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from tap_eval.allocation.allocator import allocate, minimize
from tap_eval.allocation.budget import Budget, spent
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.allocation.score import Score, importance
from tap_eval.allocation.size import bops, weight_size
from tap_eval.allocation.unit import Unit, units_of
from tap_eval.mistake import BitsMistake
from tap_eval.preparing.layers import Layer
from tap_eval.quantization.quantizer import Allocation
from tests.tap_eval.allocation.layers import make_layers

LAYERS = make_layers(40, 120, 400, 800, 80)


@pytest.mark.parametrize("bits", [(), (1, 2), (2, 9), (2, 2)])
def test_bits_outside_the_choices_are_named(bits: tuple[int, ...]) -> None:
    with pytest.raises(BitsMistake, match="whole numbers from 2 to 8"):
        Choices(bits)


def loss_of(allocation: Allocation, units: list[tuple[Unit, float]], layers: list[Layer]) -> float:
    """What `allocate` minimizes."""
    total = 0.0
    for weight, (unit, _) in zip(importance([score for _, score in units]), units, strict=True):
        bits = allocation.weights[unit.layer]
        if not isinstance(bits, int):
            (bits,) = {bits[channel] for channel in unit.channels or range(len(bits))}
        total += weight * unit.share(layers[unit.layer]) * (4.0**-bits + 4.0 ** -allocation.activations[unit.layer])
    return total


def every_allocation(units: list[tuple[Unit, float]], layers: list[Layer], choices: Choices) -> Iterator[Allocation]:
    """All that there are, whatever they cost."""
    for taken in itertools.product(*(choices.of(layers[unit.layer]) for unit, _ in units)):
        weights = [[0] * layer.out_channels for layer in layers]
        activations: list[set[int]] = [set() for _ in layers]
        for (unit, _), (weight, activation) in zip(units, taken, strict=True):
            activations[unit.layer].add(activation)
            for channel in unit.channels or range(layers[unit.layer].out_channels):
                weights[unit.layer][channel] = weight
        if all(len(each) == 1 for each in activations):
            yield Allocation(tuple(map(tuple, weights)), tuple(min(each) for each in activations))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", ["3bit", "0.73KB", "0.9KB", "85%", "0.4MBOPs", "0.25MBOPs"])
@pytest.mark.parametrize(
    ("choices", "sizes"),
    [
        (Choices((2, 3, 4, 8)), (40, 120, 400, 800, 80)),
        (Choices((2, 8), (4, 8)), (40, 120, 400, 800, 80)),
        (Choices((2, 4, 8), (8,), channel_groups=3), (160, 1280)),
        (Choices((2, 4, 8), (4, 6, 8), channel_groups=2), (280, 1160)),
        (Choices((2, 3, 8), (4, 8), pin_ends=True), (20, 700, 700, 20)),
    ],
)
def test_no_allocation_within_the_budget_costs_less(
    seed: int, budget: str, choices: Choices, sizes: tuple[int, ...]
) -> None:
    rng = random.Random(seed)
    layers, limit = make_layers(*sizes), Budget.parse(budget)
    scores: list[Score] = [
        [rng.lognormvariate(0, 1) for _ in range(4)] if choices.channel_groups > 1 else rng.lognormvariate(0, 2)
        for _ in layers
    ]
    units = units_of(scores, layers, choices)
    fitting = [
        each for each in every_allocation(units, layers, choices) if spent(each, layers, limit) <= limit.limit(layers)
    ]
    found = allocate(scores, layers, choices, limit)
    assert spent(found, layers, limit) <= limit.limit(layers)
    assert loss_of(found, units, layers) == pytest.approx(
        min(loss_of(each, units, layers) for each in fitting), rel=1e-11
    )


def general_solver(
    units: list[tuple[Unit, float]], layers: list[Layer], choices: Choices, budget: Budget, *, whole: bool
) -> float:
    """The least loss by HiGHS where each layer is one unit; unless `whole`, of mixtures of choices too."""
    options = [(unit.layer, *bits) for unit, _ in units for bits in choices.of(layers[unit.layer])]
    weights = importance([score for _, score in units])
    losses = np.array([weights[place] * (4.0**-weight + 4.0**-act) for place, weight, act in options])
    costs = [budget.cost(layers[place], weight, act) for place, weight, act in options]
    one_each = [[float(place == index) for place, _, _ in options] for index in range(len(layers))]
    solution = milp(
        losses, integrality=np.full(len(options), int(whole)), bounds=Bounds(0, 1), options={"mip_rel_gap": 0},
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint([costs], -np.inf, budget.limit(layers))],
    )  # fmt: skip
    return float(solution.fun)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("alike", [False, True])
def test_a_general_solver_finds_nothing_better_in_a_deep_network(seed: int, alike: bool) -> None:
    rng = random.Random(seed)
    layers = make_layers(*(rng.choice((64, 256)) * 9 if alike else rng.randint(1, 5000) for _ in range(30)))
    scores: list[Score] = [float(rng.randint(1, 3)) if alike else rng.lognormvariate(0, 1.5) for _ in layers]
    choices = Choices((2, 3, 4, 8), rng.choice([(8,), (4, 8)]))
    budget = Budget.parse(rng.choice(["2.7bit", f"{sum(layer.macs for layer in layers) * 21 / 1e6}MBOPs"]))
    units = units_of(scores, layers, choices)
    found = loss_of(allocate(scores, layers, choices, budget), units, layers)
    assert found <= general_solver(units, layers, choices, budget, whole=True) * (1 + 1e-9)


def test_layers_of_nearly_one_size_in_proportion_to_which_they_lose_end_near_the_optimum() -> None:
    rng = random.Random(0)
    layers = make_layers(*(rng.randint(980_000, 1_020_000) for _ in range(32)))
    scores: list[Score] = [float(layer.params) for layer in layers]
    budget, choices = Budget.parse("3.7bit"), Choices()
    found = allocate(scores, layers, choices, budget)
    assert weight_size(layers, found) <= budget.limit(layers)
    units = units_of(scores, layers, choices)
    assert loss_of(found, units, layers) < 1.05 * general_solver(units, layers, choices, budget, whole=False)


def test_the_smallest_budget_is_met_and_one_without_bounds_gives_the_most() -> None:
    scores: list[Score] = [[float(layer.index * 4 + channel + 1) for channel in range(4)] for layer in LAYERS]
    choices = Choices((2, 4, 8), (4, 8), channel_groups=4)
    assert allocate(scores, LAYERS, choices, Budget.parse("115.2KBOPs")) == uniform(LAYERS, 2, 4)
    assert allocate(scores, LAYERS, choices, Budget.parse("999999999999TBOPs")) == uniform(LAYERS, 8)
    assert allocate(scores, LAYERS, choices, Budget.parse("2bit")) == uniform(LAYERS, 2)


def test_losses_may_be_nought() -> None:
    units = [Unit(layer.index) for layer in LAYERS]
    found = minimize(lambda *_: 0.0, units, LAYERS, Choices(), Budget.parse("3bit"))
    assert weight_size(LAYERS, found) <= 3 * 1440
    only = minimize(
        lambda unit, weight, _: float(unit == 3) * 4.0**-weight, units, LAYERS, Choices(), Budget.parse("6bit")
    )
    assert only.weights[3] == 8


def test_several_at_once_give_what_each_gives_alone() -> None:
    rng = random.Random(0)
    layers = make_layers(*(rng.randint(1, 5000) * 4 for _ in range(40)))
    drawn: list[list[Score]] = [[rng.lognormvariate(0, 1) for _ in layers] for _ in range(16)]

    def allocated(scores: list[Score]) -> Allocation:
        return allocate(scores, layers, Choices((2, 3, 4, 8)), Budget.parse("3bit"))

    alone = [allocated(scores) for scores in drawn]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(allocated, drawn)) == alone


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
