"""Budgets in time, over latencies of layers as a user measured them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget, check_feasible, check_within, most_uniform, spent
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.allocation.latency import PICOSECONDS, Latencies
from tap_eval.allocation.score import importance
from tap_eval.mistake import BudgetMistake
from tap_eval.quantization.quantizer import Allocation
from tests.tap_eval.allocation.layers import make_layers

LAYERS = make_layers(40, 120, 400, 80)
HEAD = "layer,weight_bits,activation_bits,ms\n"
MS = {2: 0.03, 4: 0.02, 8: 0.05}
"""of the first layer: two bits are slower than four"""


def rows(bits: tuple[int, ...] = (2, 4, 8), activations: tuple[int, ...] = (8,)) -> str:
    return "".join(
        f"{layer.name},{weight},{activation},{MS[weight] * (1 + layer.index) * activation / 8:.6g}\n"
        for layer in LAYERS
        for weight in bits
        for activation in activations
    )


def latencies(tmp_path: Path, text: str) -> Latencies:
    path = tmp_path / "device.csv"
    path.write_text(text)
    return Latencies.read(path)


def within(budget: str, found: Latencies) -> Budget:
    return Budget.parse(budget).beside(0, latencies=found)


@pytest.mark.parametrize("budget", ["0.25ms", "310us", "0.0004s"])
@pytest.mark.parametrize("activations", [(8,), (4, 8)])
def test_the_allocation_within_a_time_is_the_best_of_all(
    tmp_path: Path, budget: str, activations: tuple[int, ...]
) -> None:
    limit = within(budget, latencies(tmp_path, HEAD + rows(activations=activations)))
    choices, scores = Choices((2, 4, 8), activations), [3.0, 1.0, 0.5, 8.0]
    weights = importance(scores)

    def loss(allocation: Allocation) -> float:
        pairs = zip(weights, allocation.weights, allocation.activations, strict=True)
        return sum(weight * (4.0**-bits + 4.0**-act) for weight, bits, act in pairs if isinstance(bits, int))

    options = list(itertools.product((2, 4, 8), activations))
    every = [Allocation(*zip(*taken, strict=True)) for taken in itertools.product(options, repeat=len(LAYERS))]
    possible = [each for each in every if spent(each, LAYERS, limit) <= limit.limit(LAYERS)]
    found = allocate(scores, LAYERS, choices, limit)
    check_within(found, LAYERS, limit)
    assert loss(found) == pytest.approx(min(map(loss, possible)), rel=1e-9)
    assert 2 not in found.weights  # slower than four
    assert limit.about == "latency an image"


def test_channels_take_their_share_and_are_never_above(tmp_path: Path) -> None:
    limit = within("0.3ms", latencies(tmp_path, HEAD + rows()))
    scores = [[1.0, 2.0, 50.0, 900.0] for _ in LAYERS]
    found = allocate(scores, LAYERS, Choices((2, 4, 8), channel_groups=4), limit)
    assert any(isinstance(bits, tuple) for bits in found.weights)
    expected = sum(
        sum(MS[each] for each in (bits if isinstance(bits, tuple) else (bits,) * 4)) / 4 * (1 + layer.index)
        for layer, bits in zip(LAYERS, found.weights, strict=True)
    )
    assert spent(found, LAYERS, limit) == pytest.approx(expected * PICOSECONDS)
    assert spent(found, LAYERS, limit) <= 0.3 * PICOSECONDS


@pytest.mark.parametrize("budget", ["40.004us", "40.01us", "80.008us", "0.1ms"])
def test_groups_of_channels_cost_no_more_than_their_layer(tmp_path: Path, budget: str) -> None:
    """Where all bits take the same time, and that is no multiple of the channels."""
    same = "".join(f"{layer.name},{bits},8,0.010001\n" for layer in LAYERS for bits in (2, 4, 8))
    limit = within(budget, latencies(tmp_path, HEAD + same))
    assert allocate([[1.0, 2.0, 50.0, 900.0] for _ in LAYERS], LAYERS, Choices(channel_groups=4), limit).most == 8


def test_uniform_bits_are_those_that_were_measured(tmp_path: Path) -> None:
    found = latencies(tmp_path, HEAD + rows())
    assert most_uniform(LAYERS, {8}, within("0.49ms", found)) == uniform(LAYERS, 4)
    assert most_uniform(LAYERS, {8}, within("0.5ms", found)) == uniform(LAYERS, 8)
    assert found.total(LAYERS, uniform(LAYERS, 8)) == 500 * PICOSECONDS // 1000
    assert found.total(LAYERS, uniform(LAYERS, 3)) is None


def test_other_amounts_are_written_as_a_user_would(tmp_path: Path) -> None:
    limit = within("0.1ms", latencies(tmp_path, HEAD + rows()))
    assert limit.times(Budget.parse("12bit").amount / 10).text == "120us"
    with pytest.raises(
        BudgetMistake,
        match=r"a budget of 0.1ms is below what the fastest bits need, 200us: raise the budget or give other --bits",
    ):
        check_feasible(LAYERS, Choices(), limit)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "layer,weight_bits,ms\n",
            "has no column activation_bits: give a CSV file with the columns layer, weight_bits",
        ),
        (HEAD + "stem,two,8,1\n", "line 2 holds no number where one is to be: give a CSV file"),
        (HEAD + "stem,2,8\n", "line 2 holds no number"),
        (HEAD + "stem,2,8,1" + "0" * 200_000, r"cannot be read as latencies \(field larger"),
        (HEAD + "stem,2,8,-1\n", "line 2: -1 is no latency in ms"),
        (HEAD + "stem,2,8,1e999999999\n", "line 2: 1e999999999 is no latency in ms"),
        (HEAD + "stem,2,8,nan\n", "line 2: nan is no latency in ms"),
        (HEAD + "stem,2,8,1\nstem,2,8,2\n", "line 3: stem at 2 bits with inputs of 8 is there twice"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BudgetMistake, match=said):
        latencies(tmp_path, text)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BudgetMistake, match="cannot be read as latencies"):
        Latencies.read(tmp_path / "none.csv")
    with pytest.raises(BudgetMistake, match="a budget of 2ms needs the latencies of layers: give --latencies FILE"):
        check_feasible(LAYERS, Choices(), Budget.parse("2ms"))
    with pytest.raises(
        BudgetMistake, match="has no latency of layer layer0 at 3 bits with inputs of 8: add it, or leave"
    ):
        check_feasible(LAYERS, Choices((2, 3, 4)), within("2ms", latencies(tmp_path, HEAD + rows())))
