"""Allocations of every size, as many of each."""

from __future__ import annotations

import pytest

from tap_eval.allocation.choices import Choices
from tap_eval.allocation.size import weight_size
from tap_eval.benchmark.drawing import drawn
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BenchmarkMistake

EDGES = (2.0, 3.0, 4.5, 8.0)


def test_strata_hold_as_many_different_allocations_of_their_sizes_the_same_by_seed(bench: Bench) -> None:
    found = drawn(bench.layers, Choices((8, 2, 3, 4)), EDGES, 25, seed=1)
    assert [len(those) for those in found] == [9, 8, 8]
    assert len({each for those in found for each in those}) == 25
    whole = sum(layer.params for layer in bench.layers)
    for those, low, high in zip(found, EDGES, EDGES[1:], strict=False):
        for each in those:
            assert low <= weight_size(bench.layers, each) / whole < high
            assert set(each.weights) <= {2, 3, 4, 8}
            assert set(each.activations) == {8}
    assert drawn(bench.layers, Choices((2, 3, 4, 8)), EDGES, 25, seed=1) == found
    assert drawn(bench.layers, Choices((2, 3, 4, 8)), EDGES, 25, seed=2) != found
    pinned = drawn(bench.layers, Choices((2, 3, 4, 8), pin_ends=True), EDGES, 25, seed=1)
    assert {(each.weights[0], each.weights[-1]) for those in pinned for each in those} == {(8, 8)}


def test_more_than_there_are_cannot_be_drawn(bench: Bench) -> None:
    with pytest.raises(BenchmarkMistake, match=r"of 2, 8 bits were found between 2 and 2.01 bits a weight where 40"):
        drawn(bench.layers, Choices((2, 8)), (2.0, 2.01), 40, seed=0)
    with pytest.raises(BenchmarkMistake, match="--least and --most from 2 to 4"):
        drawn(bench.layers, Choices((2, 4)), (7.0, 8.0), 16, seed=0)
