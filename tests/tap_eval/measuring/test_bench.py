"""Measuring once, features that hold what is promised, errors, fitness and baselines."""

from __future__ import annotations

import dataclasses
import math
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from tap_eval.allocation.budget import Budget, spent
from tap_eval.allocation.choices import Choices
from tap_eval.baselines.baselines import baselines
from tap_eval.images.images import Splits
from tap_eval.measuring.accuracy import Accuracy, mean_kl
from tap_eval.measuring.bench import Bench, Bounds, Task
from tap_eval.measuring.ledger import Ledger
from tap_eval.mistake import BudgetMistake, ImagesMistake
from tap_eval.networks.digits import DigitsCNN
from tap_eval.proxies.features import TASK, describe, visible
from tap_eval.proxies.fitness import FitnessWeights, fitness, novelty, rank_correlation
from tap_eval.proxies.proxy import Failure, Rejection, checked_scores
from tap_eval.quantization.quantizer import Allocation


def test_an_allocation_is_measured_once_in_this_run_and_the_next(
    network: DigitsCNN, splits: Splits, tmp_path: Path
) -> None:
    def opened() -> tuple[Bench, Ledger]:
        ledger = Ledger(tmp_path / "ledger.sqlite")
        return Bench("digits", network, splits, Task(Choices(), Budget.parse("3bit")), ledger), ledger

    bench, ledger = opened()
    bits = Allocation((4,) * 9 + ((2, 4) * 5,), (8,) * 10)
    first = bench.measure(bits)
    assert bench.measure(bits) == first
    assert ledger.measured == len(bench.stages)
    again, ledger = opened()
    assert again.measure(bits) == first
    assert ledger.measured == 0
    assert sum(again.correct(bits, stage).sum() for stage in range(len(again.stages))) == first.correct
    assert ledger.measured == 0
    again.measure(bits, "test")
    again.measure(bits, draw=1)
    assert ledger.measured == 2


def test_a_batch_that_does_not_fit_the_memory_is_halved(splits: Splits, tmp_path: Path) -> None:
    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 40:
                torch.empty(10**15)
            return self.layer(x.flatten(1))

    task = Task(Choices(), Budget.parse("3bit"))
    bench = Bench("hungry", Hungry(), splits, task, Ledger(tmp_path / "ledger.sqlite"), Bounds(batch=128))
    assert bench.measure(None).count == len(splits.search)
    assert "in batches of 32, since 128 images did not fit the memory" in bench.notes[-1]


def test_what_stays_in_float_and_what_is_never_used_is_said(splits: Splits, tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head, self.aux = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 10), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rows(x[:, 0])[0].mean(1))

    task = Task(Choices(), Budget.parse("4bit"))
    notes = Bench("rows", Rows(), splits, task, Ledger(tmp_path / "ledger.sqlite")).notes
    assert "rows: 16.2 KiB of its weights are never used, and are not counted" in notes
    assert any(note.startswith("rows: 88.6 % of its weights stay in float32, 4.9 KiB") for note in notes)
    assert any("rows.weight_hh_l0 (gru)" in note for note in notes)


def test_full_precision_at_chance_is_said(network: DigitsCNN, splits: Splits, bench: Bench, tmp_path: Path) -> None:
    assert not any("commonest class" in note for note in bench.notes)
    search = dataclasses.replace(splits.search, labels=(splits.search.labels + 1) % 10)
    wrong = dataclasses.replace(splits, search=search)
    task = Task(Choices(), Budget.parse("4bit"))
    (note,) = Bench("digits", network, wrong, task, Ledger(tmp_path / "ledger.sqlite")).notes
    assert "no better than by always saying the commonest class" in note


def test_stages_are_disjoint_and_make_up_the_search_split(bench: Bench) -> None:
    rows = [row for stage in bench.stages for row in stage]
    assert sorted(rows) == list(range(len(bench.splits.search)))
    assert [len(stage) for stage in bench.stages] == [19, 19, 37, 75, 150]


def test_other_weights_are_another_network(network: DigitsCNN, splits: Splits, tmp_path: Path) -> None:
    task, ledger = Task(Choices(), Budget.parse("3bit")), Ledger(tmp_path / "ledger.sqlite")
    before = Bench("digits", network, splits, task, ledger).digest
    with torch.no_grad():
        next(network.parameters()).mul_(1.01)
    assert Bench("digits", network, splits, task, ledger).digest != before


def test_other_code_over_the_same_modules_is_another_network(splits: Splits, tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self, twice: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.twice = nn.Linear(64, 10), twice

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x.flatten(1))
            return y + y.relu() if self.twice else y

    task, ledger = Task(Choices(), Budget.parse("3bit")), Ledger(tmp_path / "ledger.sqlite")
    once, again, twice = (Bench("flat", Flat(code), splits, task, ledger) for code in (False, False, True))
    assert once.digest == again.digest != twice.digest


def test_a_value_is_measured_once_by_many_threads_and_not_lost_by_a_failure(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    calls: list[int] = []

    def slow() -> int:
        calls.append(1)
        threading.Event().wait(0.3)
        return 7

    threads = [threading.Thread(target=lambda: found.append(ledger.recall("key", slow))) for _ in range(4)]
    found: list[int] = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, len(calls)) == ([7] * 4, 1)
    with pytest.raises(ZeroDivisionError):
        ledger.recall("other", lambda: 1 / 0)
    assert ledger.recall("other", lambda: 5) == 5


def test_a_claim_of_a_process_that_has_ended_is_taken_over(tmp_path: Path) -> None:
    import multiprocessing

    path = tmp_path / "ledger.sqlite"
    process = multiprocessing.get_context("spawn").Process(target=die_while_measuring, args=(path,))
    process.start()
    process.join()
    assert Ledger(path).recall("key", lambda: 3) == 3


def test_a_claim_is_renewed_while_its_holder_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tap_eval.measuring.ledger._LEASE_SECONDS", 0.5)
    started = threading.Event()

    def slow() -> int:
        started.set()
        threading.Event().wait(1.5)
        return 7

    holder = threading.Thread(target=Ledger(tmp_path / "ledger.sqlite").recall, args=("key", slow))
    holder.start()
    started.wait()
    other = Ledger(tmp_path / "ledger.sqlite")
    assert other.recall("key", lambda: 8) == 7
    assert other.measured == 0
    holder.join()


def die_while_measuring(path: Path) -> None:
    import os

    Ledger(path).recall("key", lambda: os._exit(1))


@pytest.mark.parametrize("inputs", ["metadata", "statistics"])
def test_a_proxy_sees_exactly_what_is_published(bench: Bench, inputs: str) -> None:
    described = describe(bench.prepared, bench.splits.calibrations[0], inputs)  # type: ignore[arg-type]
    for features in described:
        assert features.keys() == visible(inputs).keys()  # type: ignore[arg-type]
    assert bench.described_task.keys() == TASK.keys()
    assert [features["kind"] for features in described[:3]] == ["conv", "depthwise", "conv"]


def test_statistics_are_those_of_weights_and_activations(bench: Bench) -> None:
    features, weight = bench.features[0], bench.prepared.module(bench.layers[0]).weight
    assert features["weight_l2"] == pytest.approx(float(weight.norm()), rel=1e-5)
    assert features["weight_absmax"] == pytest.approx(float(weight.abs().max()), rel=1e-5)
    channels = features["channels"]
    assert isinstance(channels, dict)
    assert channels["weight_l1"] == pytest.approx(weight.abs().sum((1, 2, 3)).tolist(), rel=1e-5)
    assert 0 <= features["activation_entropy"] <= math.log(256)  # type: ignore[operator]


def test_layer_errors_are_of_one_layer_alone_and_not_negative(bench: Bench) -> None:
    assert len(bench.layer_errors) == len(bench.layers)
    assert min(bench.layer_errors) >= 0
    assert max(bench.layer_errors) > 10 * min(bench.layer_errors)


def test_the_distance_of_outputs_is_the_kl_divergence() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert mean_kl(p.log(), q.log()) == pytest.approx(0.25 * math.log(2))
    assert mean_kl(p.log(), p.log() + 3) == pytest.approx(0, abs=1e-12)


def test_accuracy_carries_the_wilson_interval() -> None:
    low, high = Accuracy(80, 100).interval
    assert (low, high) == pytest.approx((0.7112, 0.8666), abs=1e-4)
    assert str(Accuracy(2000, 2500)) == "80.0 % (78.4 to 81.5, n = 2,500)"


def test_images_of_another_task_and_impossible_budgets_are_refused(splits: Splits, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(ImagesMistake, match="digits has 10 classes, odd tells 7 apart"):
        Bench("odd", network, splits, Task(Choices(), Budget.parse("3bit")), ledger)
    with pytest.raises(BudgetMistake, match="below what the smallest bits need"):
        Bench("odd", network, splits, Task(Choices((4, 8)), Budget.parse("3bit")), ledger)


@pytest.mark.parametrize("groups", [1, 4])
def test_every_baseline_is_within_the_budget(network: DigitsCNN, splits: Splits, cache: Path, groups: int) -> None:
    task = Task(Choices(channel_groups=groups), Budget.parse("3bit"))
    bench = Bench("digits", network, splits, task, Ledger(cache / "ledger.sqlite"))
    found = baselines(bench, seed=0)
    assert found[0].label == "uniform W3A8"
    for each in found:
        for bits in each.allocations:
            assert spent(bits, bench.layers, task.budget) <= task.budget.limit(bench.layers)
    assert len(set(next(each for each in found if len(each.allocations) > 1).allocations)) > 1


def test_fitness_is_equation_6() -> None:
    assert fitness([0.5], [0.8], FitnessWeights(), cost=0, novelty=0) == pytest.approx(0.1 * 0.5 + 0.9 * 0.8)
    weights = FitnessWeights(alpha=0.5, beta=0.1, gamma=0.2)
    assert fitness([1, 0], [1, 0.5], weights, cost=1, novelty=0.5) == pytest.approx(0.25 + 0.375 - 0.1 + 0.1)


def test_ranks_and_novelty() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    assert novelty([[1, 2, 3]], []) == 1
    assert novelty([[1, 2, 3]], [[[3, 2, 1]]]) == pytest.approx(0)


@pytest.mark.parametrize(
    ("value", "failure"),
    [
        (None, Failure.WRONG_SHAPE), ([1.0], Failure.WRONG_SHAPE), ([1.0, "a"], Failure.WRONG_SHAPE),
        ([1.0, True], Failure.WRONG_SHAPE), ([1.0, [1.0]], Failure.WRONG_SHAPE), ([1.0, math.nan], Failure.NOT_FINITE),
        ([1.0, [1.0, math.inf]], Failure.NOT_FINITE), ([1, 2**1100], Failure.NOT_FINITE),
        ([1.0, [1e308, 1e308]], Failure.NOT_FINITE), ([1.0, 1.0], Failure.CONSTANT), ([2, [2, 2]], Failure.CONSTANT),
    ],
)  # fmt: skip
def test_scores_that_are_none_die_by_their_name(value: object, failure: Failure) -> None:
    found = checked_scores(value, [1, 2], by_channel=True)
    assert isinstance(found, Rejection)
    assert found.failure is failure


def test_scores_may_be_of_layers_or_of_channels() -> None:
    assert checked_scores([1, [2, 3.5]], [1, 2], by_channel=True) == [1.0, [2.0, 3.5]]
    assert checked_scores([1, [2, 3.5]], [1, 2], by_channel=False) == [1.0, 2.75]
    alike = checked_scores([[1, 3], [2, 2]], [2, 2], by_channel=False)
    assert isinstance(alike, Rejection)
    assert alike.failure is Failure.CONSTANT
