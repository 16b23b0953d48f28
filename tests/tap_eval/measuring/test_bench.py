"""A network with its images: measured once, told apart from others, refused where the two do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.images.images import Images, Splits
from tap_eval.measuring.accuracy import Accuracy
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.recipe import Bounds
from tap_eval.measuring.task import Task
from tap_eval.mistake import BudgetMistake, ImagesMistake
from tap_eval.networks.digits import DigitsCNN
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
    assert ledger.measured == len(bench.stages) + 1, "and full precision, which divergence is from"
    again, ledger = opened()
    assert again.measure(bits) == first
    assert ledger.measured == 0
    assert sum(again.seen(bits, stage).correct.sum() for stage in range(len(again.stages))) == first.correct
    assert ledger.measured == 0
    again.measure(bits, "test")
    again.measure(bits, draw=1)
    assert ledger.measured == 3


class Either(nn.Module):
    """Goes one way for bright images and another for dark ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bright, self.dark, self.last = nn.Linear(64, 6), nn.Linear(64, 6), nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        way = self.bright if x[0, 0, 0, 0] > 0 else self.dark
        return self.last(way(x.flatten(1)).relu())


def test_features_are_of_the_images_that_were_looked_at(splits: Splits, tmp_path: Path) -> None:
    def opened(search: Images, folder: str) -> Bench:
        images = dataclasses.replace(splits, search=search, calibrations=(bright,))
        ledger = Ledger(tmp_path / folder / "ledger.sqlite")
        return Bench("either", Either().eval(), images, Task(Choices(), Budget.parse("3bit")), ledger)

    def lit(first: int, light: int) -> Images:
        some = splits.search.only(np.arange(first, first + 32))
        stored = some.stored[some.rows].copy()
        stored[:, 0, 0, 0] = light
        return Images(stored, some.labels, some.transform)

    bright, (one, other) = lit(0, 255), (lit(first, 0) for first in (32, 64))
    features = [opened(search, "a").features for search in (one, other)]
    assert features[0][2]["name"] == "dark"
    assert features[0][2]["input_std"] != features[1][2]["input_std"], "which only these images reach"
    assert features[1] == opened(other, "b").features


def test_how_ranges_are_chosen_is_part_of_what_is_measured_and_the_usual_way_is_not_named(
    network: DigitsCNN, splits: Splits, tmp_path: Path
) -> None:
    def opened(**activations: Any) -> tuple[Bench, Ledger]:
        ledger = Ledger(tmp_path / "ledger.sqlite")
        return Bench("digits", network, splits, Task(Choices(), Budget.parse("3bit"), **activations), ledger), ledger

    usual, ledger = opened()
    assert usual.rounded_by == ["gptq", (2, 4, 8), Bounds().moments], "what was kept before is found"
    assert "minmax" not in str(usual.task)
    bits = uniform(usual.layers, 4)
    both = [usual.measure(bits), usual.measure(bits, finished=True)]
    same, ledger = opened(attention="off")
    assert [same.measure(bits), same.measure(bits, finished=True)] == both
    assert ledger.measured == 0, "it has no attention"
    other, ledger = opened(ranges="percentile")
    assert [other.measure(bits), other.measure(bits, finished=True)] != both
    assert ledger.measured == len(other.stages) + 1
    for finished in (False, True):
        one, another = (bench.quantized(bits, finished=finished).layers for bench in (usual, other))
        assert one[1].covering(8).scale > another[1].covering(8).scale
    assert other.beside(other.task.budget) == usual.beside(usual.task.budget)


def test_networks_finished_side_by_side_are_what_each_is_alone(
    network: DigitsCNN, splits: Splits, tmp_path: Path
) -> None:
    allocations = [Allocation((bits,) * 10, (8,) * 10) for bits in (2, 3, 4)]
    together, alone = (
        Bench(
            "digits", network, splits, Task(Choices(), Budget.parse("3bit")), Ledger(tmp_path / name / "ledger.sqlite")
        )
        for name in ("together", "alone")
    )
    together.finish(allocations, [0])
    for allocation in allocations:
        one, other = (bench.quantized(allocation).logits(splits.test.pixels[:20], 20) for bench in (together, alone))
        assert torch.equal(one, other)
    assert len({together.measure(allocation, "test", finished=True) for allocation in allocations}) > 1


def test_networks_that_keep_values_of_a_pass_are_finished_side_by_side_too(splits: Splits, tmp_path: Path) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.third, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = self.first(x).relu()
            y = self.kept if float(self.kept.mean()) < 1e9 else x  # so that its steps cannot be recorded
            return self.head((self.third(self.second(y).relu()).relu() + self.kept).mean((2, 3)))

    torch.manual_seed(0)
    task, network = Task(Choices(), Budget.parse("4bit")), Keeping()
    allocations = [Allocation(bits, (8,) * 4) for bits in ((2, 2, 2, 8), (8, 4, 8, 8), (4, 4, 2, 8), (2, 4, 8, 2))]
    together, alone = (
        Bench("keeping", network, splits, task, Ledger(tmp_path / name / "ledger.sqlite")) for name in ("all", "one")
    )
    together.finish(allocations, [0])
    assert together.unfit
    for allocation in allocations:
        one, other = (bench.quantized(allocation).logits(splits.test.pixels[:20], 20) for bench in (together, alone))
        assert torch.equal(one, other)


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
    assert any("in batches of 32, since 128 images did not fit the memory" in note for note in bench.notes)


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
    rest, least = 4 * (3 * 16 * 8 + 3 * 16 * 16 + 2 * 3 * 16), 10 * 4 + 10 * 8 + 5  # the head at 2 bits, 16 a row
    with pytest.raises(BudgetMistake, match=r"need, 5\.117KB: raise the budget"):
        Bench("rows", Rows(), splits, Task(Choices(), Budget.parse("5116B")), Ledger(tmp_path / "ledger.sqlite"))
    met = Bench("rows", Rows(), splits, Task(Choices(), Budget.parse("5117B")), Ledger(tmp_path / "ledger.sqlite"))
    found = allocate([1.0], met.layers, met.task.choices, met.task.budget)
    assert met.size(found).total == rest + least == 5117
    assert met.size(None).total == rest + 4 * (160 + 10)


def test_full_precision_at_chance_is_said(network: DigitsCNN, splits: Splits, bench: Bench, tmp_path: Path) -> None:
    assert not any("commonest class" in note for note in bench.notes)
    search = dataclasses.replace(splits.search, labels=(splits.search.labels + 1) % 10)
    wrong = dataclasses.replace(splits, search=search)
    task = Task(Choices(), Budget.parse("4bit"))
    notes = Bench("digits", network, wrong, task, Ledger(tmp_path / "ledger.sqlite")).notes
    assert any("no better than by always saying the commonest class" in note for note in notes)


def test_stages_are_disjoint_and_make_up_the_search_split(bench: Bench) -> None:
    rows = [row for stage in bench.stages for row in stage]
    assert sorted(rows) == list(range(len(bench.splits.search)))
    assert [len(stage) for stage in bench.stages] == [4, 4, 7, 15, 30, 60, 120, 60]


def test_what_images_say_is_kept_under_which_images_they_are(
    bench: Bench, network: DigitsCNN, splits: Splits, tmp_path: Path
) -> None:
    bits, ledger = uniform(bench.layers, 2), Ledger(tmp_path / "ledger.sqlite")
    one, other = (Bench("digits", network, splits, bench.task, ledger) for _ in range(2))
    vars(other)["stages"] = [np.arange(40), np.arange(40, 300)]  # as another release may have them
    first, second = one.seen(bits, 0), other.seen(bits, 0)
    assert (len(first), len(second)) == (4, 40)
    assert np.array_equal(second.correct[one.stages[0][one.stages[0] < 40]], first.correct[one.stages[0] < 40])


def test_the_winner_is_chosen_on_images_that_candidates_are_not_compared_on(bench: Bench) -> None:
    allocation = Allocation((4,) * 10, (8,) * 10)
    searched, whole, held_out = bench.searched(allocation), bench.measure(allocation), bench.held_out(allocation, 0)
    assert (searched.count, len(held_out), whole.count) == (240, 60, 300)
    finished = bench.measure(allocation, finished=True)
    assert held_out.kl.sum() == pytest.approx(0, abs=300 * finished.kl), "it is finished"
    assert searched.correct <= whole.correct <= searched.correct + 60
    assert not np.array_equal(bench.held_out(allocation, 1).kl, held_out.kl)


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


def test_layer_errors_are_of_one_layer_alone_and_not_negative(bench: Bench) -> None:
    assert len(bench.layer_errors) == len(bench.layers)
    assert min(bench.layer_errors) >= 0
    assert max(bench.layer_errors) > 10 * min(bench.layer_errors)


def test_images_of_another_task_and_impossible_budgets_are_refused(splits: Splits, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(ImagesMistake, match="digits has 10 classes, odd tells 7 apart"):
        Bench("odd", network, splits, Task(Choices(), Budget.parse("3bit")), ledger)
    with pytest.raises(BudgetMistake, match="below what the smallest bits need"):
        Bench("odd", network, splits, Task(Choices((4, 8)), Budget.parse("3bit")), ledger)


def test_one_bench_serves_several_budgets_and_computes_nothing_twice(
    network: DigitsCNN, splits: Splits, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    bench = Bench("digits", network, splits, Task(Choices(), Budget.parse("3bit")), ledger)
    errors, features = bench.layer_errors, bench.features
    assert bench.described_task["budget"] == "3bit"
    accuracy, measured = bench.measure(Allocation((4,) * 10, (8,) * 10)), ledger.measured
    other = bench.at(Budget.parse("4.5bit"))
    assert (other.task.budget.text, bench.task.budget.text) == ("4.5bit", "3bit")
    assert other.described_task["budget"] == "4.5bit"
    assert other.layer_errors is errors
    assert other.features is features
    assert other.measure(Allocation((4,) * 10, (8,) * 10)) == accuracy
    assert ledger.measured == measured
    with pytest.raises(BudgetMistake, match=r"^digits: a budget of 1bit is below what the smallest bits need, 2bit"):
        bench.at(Budget.parse("1bit"))


def test_each_way_of_rounding_is_measured_apart(network: DigitsCNN, splits: Splits, tmp_path: Path) -> None:
    ledger, bits = Ledger(tmp_path / "ledger.sqlite"), Allocation((2,) * 10, (8,) * 10)
    found = {}
    full = Bench("digits", network, splits, Task(Choices(), Budget.parse("3bit")), ledger).measure(None, "test")
    for rounding in ("nearest", "gptq"):
        task = Task(Choices(), Budget.parse("3bit"), rounding=rounding)  # type: ignore[arg-type]
        bench = Bench("digits", network, splits, task, ledger)
        for finished in (False, True):
            before = ledger.measured
            found[rounding, finished] = bench.measure(bits, "test", finished=finished).top1
            assert bench.measure(bits, "test", finished=finished).top1 == found[rounding, finished]
            assert ledger.measured == before + 1
        before = ledger.measured
        assert bench.measure(None, "test", finished=True) == full == Accuracy(full.correct, full.count, 0.0)
        assert ledger.measured == before
        assert bench.layer_errors
        assert ledger.measured == before + 1
    assert found["nearest", False] < found["gptq", False] < found["gptq", True]
    again = Bench("digits", network, splits, Task(Choices(), Budget.parse("3bit")), Ledger(tmp_path / "ledger.sqlite"))
    ((measured,),) = again.measure_all([bits], "test", [0], kept=True)
    assert measured.top1 == found["gptq", True]


def test_a_network_is_kept_finished_unless_that_does_harm_beyond_chance(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation = Allocation((2,) * 10, (8,) * 10)
    assert bench.measure(allocation, finished=True).kl < bench.measure(allocation).kl
    assert bench.keeps_finished(allocation)
    ((kept,),) = bench.measure_all([allocation], "test", [0], kept=True)
    assert kept == bench.measure(allocation, "test", finished=True)
    better = Allocation((8,) * 10, (8,) * 10)
    plain = bench.measure(better)
    assert bench.keeps_finished(better) or bench.measure(better, finished=True).kl > plain.kl
    unasked = dataclasses.replace(bench.task, finish=False)
    monkeypatch.setattr(bench, "task", unasked)
    assert not bench.keeps_finished(allocation)
