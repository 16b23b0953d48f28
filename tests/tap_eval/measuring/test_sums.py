"""A network is measured, finished and kept with sums in integers where asked for, and told where it cannot be."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tap_eval.allocation.budget import Budget, most_uniform
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.images.images import Splits
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.job import Job
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.quantization import integer
from tap_eval.quantization.sums import NONE, Ranged, SumsIn

MOST = 8 if integer.exact() else 7


class Residual(nn.Module):
    """A sum of two convolutions' outputs, and one with a third's."""

    def __init__(self, branching: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.deep = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)
        self.branching = branching

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.deep(x) + x).relu()
        x = (self.wide(x) + x).relu().mean((2, 3))
        return self.head(x if not self.branching or float(x.mean()) < 1e9 else -x)


def opened(splits: Splits, folder: Path, sums: SumsIn, network: nn.Module | None = None) -> Bench:
    task = Task(Choices((2, 4, MOST)), Budget.parse("4bit"), sums=sums)
    return Bench("residual", network or Residual(), splits, task, Ledger(folder / "ledger.sqlite"))


def test_what_is_measured_depends_on_sums_and_what_does_not_is_measured_once(splits: Splits, tmp_path: Path) -> None:
    first, second = (opened(splits, tmp_path, sums) for sums in ("float", "int8"))
    allocation = uniform(first.layers, 2)
    for finished in (False, True):
        first.measure(allocation, "test", finished=finished)
    first.measure(None)
    before = [first.layer_errors, first.features, first.weight_errors]
    assert [second.layer_errors, second.features, second.weight_errors] == before
    second.measure(None)
    assert second._ledger.measured == 0
    for finished in (False, True):
        second.measure(allocation, "test", finished=finished)  # full precision, which divergence is from, is known
        assert second._ledger.measured == 1 + finished
    one, other = (bench.quantized(allocation).logits(splits.test.pixels[:20], 20) for bench in (first, second))
    assert not torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("finished", [False, True])
def test_both_paths_measure_the_same(splits: Splits, tmp_path: Path, finished: bool) -> None:
    bench = opened(splits, tmp_path, "int8")
    assert bench.unfit is None
    allocation = uniform(bench.layers, 4)
    job = Job(allocation, "search", 0, np.arange(300), integers=True, sums=True, finished=finished)
    fast, simulated = (bench._local.logits(replace(job, integers=integers)) for integers in (True, False))
    assert (fast.argmax(1) != simulated.argmax(1)).sum() <= 3


@pytest.mark.parametrize("finished", [False, True])
def test_the_network_that_is_given_is_the_one_that_is_measured(splits: Splits, tmp_path: Path, finished: bool) -> None:
    bench = opened(splits, tmp_path, "int8")
    allocation = uniform(bench.layers, 4)
    job = Job(allocation, "search", 0, np.arange(300), integers=False, sums=True, finished=finished)
    network = bench.quantized(allocation, finished=finished)
    program = network.sums and network.sums.recorded(50)
    assert program
    assert [each.layer for each, _ in network.carried(program.steps, program.logits)] == [1, None, 2, None, None, 3]
    logits = network.logits(splits.search.pixels, 50)
    assert torch.equal(bench._local.logits(job).argmax(1), logits.argmax(1))
    there = pickle.loads(pickle.dumps(bench._local))
    assert torch.equal(there.logits(job), bench._local.logits(job))


def test_a_network_that_cannot_be_recorded_keeps_float_sums_and_says_so(splits: Splits, tmp_path: Path) -> None:
    asked, plain = (opened(splits, tmp_path, sums, Residual(branching=True)) for sums in ("int8", "float"))
    assert any("is measured with sums in float32, in place of --sums int8: its steps" in note for note in asked.notes)
    assert not any("sums" in note for note in plain.notes)
    allocation = uniform(plain.layers, 4)
    for finished in (False, True):
        expected = plain.measure(allocation, "test", finished=finished)
        assert asked.measure(allocation, "test", finished=finished) == expected
    assert asked._ledger.measured == 1, "the notes look at full precision, and nothing else is new"
    assert asked.quantized(allocation).sums is None


def test_a_worker_that_measures_otherwise_is_found_out(splits: Splits, tmp_path: Path) -> None:
    bench = opened(splits, tmp_path, "int8")
    job = Job(uniform(bench.layers, 4), "search", 0, np.arange(20), integers=False)
    with pytest.raises(RuntimeError, match="cannot measure as the others do"):
        bench._local.logits(job)


def test_scales_of_sums_count_within_a_budget_in_bytes(splits: Splits, tmp_path: Path) -> None:
    plain, summed = (opened(splits, tmp_path, sums) for sums in ("float", "int8"))
    allocation = uniform(plain.layers, 4)
    assert (plain.sums, summed.sums) == (NONE, Ranged(3, (1, 2)))
    assert summed.size(allocation).parts() == {
        **plain.size(allocation).parts(), "inputs": plain.size(allocation).inputs + 3 * 5,
    }  # fmt: skip
    few = uniform(plain.layers, 4, 4)  # where what shares the range of an input has other integers
    assert summed.size(few).total == plain.size(few).total + (3 + 2) * 5
    exact = Budget.parse(f"{plain.size(allocation).total}B")
    assert most_uniform(plain.layers, {8}, plain.beside(exact)) == allocation
    assert most_uniform(summed.layers, {8}, summed.beside(exact)) == uniform(plain.layers, 3)
