"""The winner is chosen by images and calibration draws that candidates were not bred on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graphs.state import Bits, Candidate
from graphs.winner import FINALISTS, choose, finalists
from tap_eval.allocation.budget import Budget
from tap_eval.measuring.bench import Bench
from tap_eval.proxies.fitness import FitnessWeights
from tap_eval.quantization.quantizer import Allocation


def candidate(name: str, fitness: float, weights: tuple[int, ...] = (), dropped: bool = False) -> Candidate:
    """Its fitness is its worth, as with an alpha of 0."""
    allocations = [Bits.of(Allocation(weights, (8,) * len(weights)))] if weights else []
    return Candidate(
        name=name, generation=0, template="mutation", parents=[], thought="", code="", fitness=fitness,
        allocations=allocations, dropped=dropped, top1=[fitness], kl=[-math.log(fitness or 1)],
    )  # fmt: skip


def test_the_fittest_that_saw_all_images_are_looked_at_again() -> None:
    many = [candidate(f"p{index:03d}", index / 10, dropped=index == 8) for index in range(10)]
    assert [each.name for each in finalists(many)] == ["p009", "p007", "p006", "p005", "p004"]
    assert FINALISTS == 5


def test_one_that_is_surely_better_where_nothing_was_bred_goes_ahead_of_the_fittest(bench: Bench) -> None:
    """What is called the fittest is the worst network: its fitness was luck."""
    lucky, honest, third = (
        candidate(*each) for each in (("p0", 0.9, (2,) * 10), ("p1", 0.8, (8,) * 10), ("p2", 0.7, (4,) * 10))
    )
    found = choose([lucky, honest, third], [bench], FitnessWeights(0.0, worth="kl"))
    assert [each.name for each in found] == ["p1", "p2", "p0"]
    first, _, last = found
    assert (first.behind, first.error) == (0, 0)
    held_out = [bench.held_out(each.allocations[0].allocation(), 1) for each in (honest, lucky)]
    assert len(held_out[0]) == 60
    assert first.kl == pytest.approx(held_out[0].kl.mean())
    assert last.top1 == held_out[1].accuracy.top1
    assert last.behind == pytest.approx(np.exp(-first.kl) - np.exp(-last.kl))
    assert last.behind > 3 * last.error > 0


def test_the_fittest_wins_where_nothing_can_be_told(bench: Bench) -> None:
    one, other = candidate("p0", 0.8, (8,) * 10), candidate("p1", 0.7, (8,) * 9 + (7,))
    for fitter, less in ((one, other), (other, one)):
        assert choose([fitter, less], [bench], FitnessWeights(0.0, worth="accuracy"))[0].name == fitter.name


def test_what_else_fitness_counts_counts_here_too(bench: Bench) -> None:
    lucky, honest = candidate("p0", 0.9, (2,) * 10), candidate("p1", 0.8, (8,) * 10)
    assert choose([lucky, honest], [bench], FitnessWeights(1.0, worth="kl"))[0].name == "p0"


def test_the_same_images_at_two_budgets_are_no_more_witnesses_than_at_one(bench: Bench) -> None:
    second = bench.at(Budget.parse("4bit"), "digits at 4bit")
    pair = [candidate("p0", 0.9, (4,) * 10), candidate("p1", 0.8, (3,) * 10)]
    twice = [
        each.model_copy(update={"allocations": each.allocations * 2, "top1": each.top1 * 2, "kl": each.kl * 2})
        for each in pair
    ]
    once, again = (
        choose(*given, FitnessWeights(0.0, worth="kl"))[1] for given in ((pair, [bench]), (twice, [bench, second]))
    )
    assert again.error == pytest.approx(once.error)
    assert again.behind == pytest.approx(once.behind)
