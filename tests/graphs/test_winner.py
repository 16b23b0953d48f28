"""The winner is chosen by images and calibration draws that candidates were not bred on."""

from __future__ import annotations

import numpy as np
import pytest

from graphs.state import Bits, Candidate
from graphs.winner import FINALISTS, choose, finalists
from tap_eval.measuring.bench import Bench
from tap_eval.quantization.quantizer import Allocation


def candidate(name: str, fitness: float, weights: tuple[int, ...] = (), dropped: bool = False) -> Candidate:
    allocations = [Bits.of(Allocation(weights, (8,) * len(weights)))] if weights else []
    return Candidate(
        name=name, generation=0, template="mutation", parents=[], thought="", code="", fitness=fitness,
        allocations=allocations, dropped=dropped,
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
    found = choose([lucky, honest, third], [bench], "kl")
    assert [each.name for each in found] == ["p1", "p2", "p0"]
    first, _, last = found
    assert (first.behind, first.error) == (0, 0)
    left_out = [bench.left_out(each.allocations[0].allocation(), 1) for each in (honest, lucky)]
    assert len(left_out[0]) == 60
    assert first.kl == pytest.approx(left_out[0].kl.mean())
    assert last.top1 == left_out[1].accuracy.top1
    assert last.behind == pytest.approx(np.exp(-first.kl) - np.exp(-last.kl))
    assert last.behind > 3 * last.error > 0


def test_the_fittest_wins_where_nothing_can_be_told(bench: Bench) -> None:
    one, other = candidate("p0", 0.8, (8,) * 10), candidate("p1", 0.7, (8,) * 9 + (7,))
    for fitter, less in ((one, other), (other, one)):
        assert choose([fitter, less], [bench], "accuracy")[0].name == fitter.name
