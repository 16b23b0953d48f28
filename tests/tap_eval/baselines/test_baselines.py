"""What proxies are compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from tap_eval.allocation.budget import Budget, check_within, spent
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.score import importance
from tap_eval.baselines import hawq, hawq_v2, snip, synflow
from tap_eval.baselines.baselines import RULES, BaselineMistake, baselines, losses, named
from tap_eval.baselines.best_of_random import best, drawn, passes
from tap_eval.baselines.curvature import VERSIONS, Kind, Recall, curvature, top_eigenvalues, traces
from tap_eval.baselines.gradients import Loss
from tap_eval.baselines.rule import Effort, by_gains, least
from tap_eval.images.images import Splits
from tap_eval.measuring.accuracy import Measurement
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.mistake import NetworkMistake
from tap_eval.networks.digits import DigitsCNN
from tests.tap_eval.baselines.small import Aside, Attending, Rescaled, Spreads, Stopped, opened, two_layers

MEASURED = {"best_of_random", "direct"}
QUICK = [name for name in RULES if name not in MEASURED]


@pytest.mark.parametrize(("groups", "budget"), [(1, "3bit"), (4, "3bit"), (4, "5511B")])
def test_every_baseline_is_within_the_budget(
    network: DigitsCNN, splits: Splits, cache: Path, groups: int, budget: str
) -> None:
    task = Task(Choices(channel_groups=groups), Budget.parse(budget))
    bench = Bench("digits", network, splits, task, Ledger(cache / "ledger.sqlite"))
    found = baselines(bench, seed=0)
    assert [each.label for each in found[:2]] == ["uniform W3A8", "random scores"]
    assert len(found) == 5
    for each in [*found, *baselines(bench, seed=0, names=QUICK)]:
        for bits in each.allocations:
            assert spent(bits, bench.layers, task.budget) <= task.budget.limit(bench.layers)
            assert task.budget.unit == "bit" or bench.size(bits).total <= task.budget.amount
    assert len(set(next(each for each in found if len(each.allocations) > 1).allocations)) > 1


@pytest.mark.parametrize("budget", ["3.7bit", "6bit", "0.004GBOPs"])
def test_every_baseline_keeps_to_the_choices(network: DigitsCNN, splits: Splits, cache: Path, budget: str) -> None:
    task = Task(Choices((2, 3, 8), (4, 8), pin_ends=True), Budget.parse(budget))
    bench = Bench("digits", network, splits, task, Ledger(cache / "ledger.sqlite"))
    found = {each.label: each for each in baselines(bench, seed=0, names=QUICK)}
    assert len(found) == len(QUICK)
    for label, each in found.items():
        for bits in each.allocations:
            check_within(bits, bench.layers, bench.task.budget)
            if not label.startswith("uniform"):
                options = [task.choices.of(layer) for layer in bench.layers]
                pairs = zip(bits.weights, bits.activations, strict=True)
                assert all(pair in its for pair, its in zip(pairs, options, strict=True)), label
    assert found["HAWQ-V2"].allocations == found["HAWQ-V3"].allocations  # one problem, two exact solvers
    assert {label for label, each in found.items() if each.cost.rounds} == {
        "measured layer error", "AutoQuantize", "measured errors of all bits",
    }  # fmt: skip
    assert all(each.cost.seconds > 0 for each in found.values() if each.sees and each.sees != ("weights",))


def test_the_same_seed_gives_the_same_and_what_is_kept_is_not_computed_again(
    network: DigitsCNN, splits: Splits, tmp_path: Path
) -> None:
    task = Task(Choices(), Budget.parse("3bit"))
    first, again = (
        Bench("digits", network, splits, task, Ledger(tmp_path / f"{place}.sqlite")) for place in ("one", "other")
    )
    names = [name for name in QUICK if name not in ("layer_error", "every_error")]
    found = baselines(first, seed=3, names=names)
    others = baselines(again, seed=3, names=names)
    assert [each.allocations for each in found] == [each.allocations for each in others]
    before = Ledger(tmp_path / "one.sqlite")
    kept = Bench("digits", network, splits, task, before).at(Budget.parse("4bit"))
    costs = {each.label: each.cost for each in found}
    for each in baselines(kept, seed=3, names=names[1:]):
        assert each.cost == costs[each.label]
    assert before.measured == 0


def test_measured_searches_give_the_least_divergence_of_what_they_tried(bench: Bench) -> None:
    tried = drawn(bench, 20, seed=0)
    assert len(set(tried)) == len(tried) == 20
    firsts = sorted(tried, key=lambda bits: Measurement.joined([bench.seen(bits, part) for part in range(3)]).mean_kl)
    assert best(bench, tried) == min(firsts[:2], key=lambda bits: bench.searched(bits).kl)
    assert 155 <= passes(bench, 1000) <= 158  # 1,000 of 5 % and 100 of 75 %, of the 80 % that are compared
    (found,) = baselines(bench, seed=0, names=["direct"], measurements=12)
    assert found.cost.steps == 12
    assert found.cost.images == bench.compared
    uniform = baselines(bench, seed=0, names=["uniform"])[0].allocations[0]
    assert bench.searched(found.allocations[0]).kl < bench.searched(uniform).kl
    check_within(found.allocations[0], bench.layers, bench.task.budget)


def test_what_a_small_network_has_is_drawn_once_each(splits: Splits, tmp_path: Path) -> None:
    bench = opened(nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 10)), splits, tmp_path, "3bit")
    found = drawn(bench, 1000, seed=0)
    assert 1 <= len(found) == len(set(found)) <= 9


class Residual(nn.Module):
    """One of its layers changes nothing, whatever its bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.dead = nn.Linear(64, 16), nn.Linear(16, 16)
        self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 10)
        nn.init.zeros_(self.dead.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1)).relu()
        x = x + self.dead(x)
        return self.last(x + self.second(x).relu())


class Tokens(nn.Module):
    """A transformer for the digits, most of whose values stay in float."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = VisionTransformer(8, 4, 2, 2, 12, 24, num_classes=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.expand(-1, 3, -1, -1))


def test_transformers_have_every_baseline(splits: Splits, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Tokens()
    nn.init.normal_(network.inner.heads.head.weight)
    bench = opened(network, splits, tmp_path, "3bit")
    assert bench.prepared.share_left > 0
    said: list[str] = []
    found = baselines(bench, 0, QUICK, left_out=said.append)
    assert said == []
    assert len(found) == len(QUICK)
    for each in found:
        check_within(each.allocations[0], bench.layers, bench.task.budget)


def test_what_a_network_cannot_have_is_left_out_with_a_sentence(splits: Splits, tmp_path: Path) -> None:
    bench = opened(Stopped(), splits, tmp_path)
    said: list[str] = []
    found = baselines(bench, 0, ["ompq", "hawq", "snip", "uniform"], left_out=said.append)
    assert [each.label for each in found] == ["uniform W4A8", "OMPQ"]
    assert [sentence.partition(" in ")[0] for sentence in said] == [
        "HAWQ: small has no gradients", "bit-SNIP: small has no gradients",
    ]  # fmt: skip


def test_of_what_is_not_finite_no_bits_follow(splits: Splits, tmp_path: Path) -> None:
    bench = opened(Spreads(), splits, tmp_path)
    said: list[str] = []
    found = baselines(bench, 0, ["hawq", "hawq_v2", "hawq_v3", "snip", "uniform"], left_out=said.append)
    assert [each.label for each in found] == ["uniform W4A8", "bit-SNIP"]
    assert said == [
        f"{label}: of conv in small it computes nan, from which no bits follow: leave it out of --baselines."
        for label in ("HAWQ", "HAWQ-V2", "HAWQ-V3")
    ]
    with pytest.raises(ValueError, match="a loss is NaN or infinite, from which no allocation follows"):
        least(bench, lambda layer, weight, activation: math.nan if layer else 1.0)


def test_a_head_that_nothing_reads_costs_no_baseline(splits: Splits, tmp_path: Path) -> None:
    bench = opened(Aside(), splits, tmp_path, "3bit", output="logits")
    assert [layer.name for layer in bench.layers] == ["first", "last", "aside"]
    names = ["hawq", "hawq_v2", "hawq_v3", "emq", "snip", "synflow", "auto_quantize"]
    found = baselines(bench, 0, names)
    assert len(found) == len(names)
    assert snip.scores(bench)[2] == synflow.scores(bench)[2] == 0


def test_what_is_read_is_told_from_what_is_not(splits: Splits, tmp_path: Path) -> None:
    attending = opened(Attending(), splits, tmp_path)
    assert [layer.name for layer in attending.layers][-2:] == ["aside", "last"]
    assert snip.scores(attending)[-2] == 0 < snip.scores(attending)[-1]
    with pytest.raises(NetworkMistake, match="small has no gradients in spread, since its code stops them"):
        snip.scores(opened(Rescaled(), splits, tmp_path))


def test_uniform_bits_give_inputs_fewer_bits_where_that_alone_fits(splits: Splits, tmp_path: Path) -> None:
    task = Task(Choices((2, 4, 8), (2, 4, 8)), Budget.parse("8bit"), rounding="nearest", sums="float")
    bench = Bench("small", two_layers().eval(), splits, task, Ledger(tmp_path / "ledger.sqlite"))
    macs = sum(layer.macs for layer in bench.layers)
    for operations, label in ((16, "uniform W2A8"), (15, "uniform W3A4"), (8, "uniform W2A4"), (4, "uniform W2A2")):
        (found,) = baselines(bench.at(Budget.parse(f"{operations * macs / 1e9:.9f}GBOPs")), 0, ["uniform"])
        assert found.label == label


def test_a_layer_whose_error_is_nothing_gets_the_fewest_bits(splits: Splits, tmp_path: Path) -> None:
    bench = opened(Residual(), splits, tmp_path, "3bit")
    first, dead, second, last = bench.layer_errors
    assert dead == 0 < second < last < first
    (found,) = baselines(bench, 0, ["layer_error"])
    assert found.allocations[0].weights == (2, 2, 4, 8)  # the first has four times as many weights


def test_a_search_tells_what_it_measured_and_no_seconds_where_some_was_kept(splits: Splits, tmp_path: Path) -> None:
    bench = opened(two_layers(), splits, tmp_path, "4bit")
    (found,) = baselines(bench, 0, ["direct"], measurements=40)
    assert 1 <= found.cost.steps <= len(drawn(bench, 1000, seed=0)) == 2
    assert found.cost.seconds > 0
    assert found.note == ""
    (again,) = baselines(bench, 0, ["direct"], measurements=41)
    assert (again.allocations, again.cost.seconds) == (found.allocations, 0)
    assert again.note == "some of its measurements are from before, so that its seconds are not known"


def test_scores_and_losses_of_the_simple_rules_are_their_formulas(bench: Bench) -> None:
    bits, at = sorted(bench.task.choices.weights), max(bench.task.choices.activations)
    found = losses(bench, 0, left_out=pytest.fail)
    for layer, weights, operations in zip(bench.layers, found["bparams"], found["bops"], strict=True):
        assert [weights[0] - each for each in weights] == [layer.params * (each - bits[0]) for each in bits]
        assert [operations[0] - each for each in operations] == [layer.macs * at * (each - bits[0]) for each in bits]
    for before, after in itertools.pairwise(found["earlier"]):
        assert after[0] < before[0]


def test_hawq_ranks_layers_by_the_size_of_the_eigenvalue_a_weight(splits: Splits, tmp_path: Path) -> None:
    bench = opened(Residual(), splits, tmp_path, "3bit")
    values = [8.0, -64.0, 0.0, 4.0]
    params = [layer.params for layer in bench.layers]
    for kind, version in VERSIONS.items():
        bench.once([kind, version, 0], lambda: (values, 7))  # so that this is what was kept of the Hessian
    loss = hawq.RULE.find(bench, Effort(0, 0)).loss
    assert loss
    scores = [abs(value) / size for value, size in zip(values, params, strict=True)]
    expected = importance([max(score, 1e-12 * max(scores)) for score in scores])
    assert [loss(layer, 2, 8) for layer in range(4)] == pytest.approx((expected * (4.0**-2 + 4.0**-8)).tolist())
    means, cost, note = hawq_v2.perturbations(bench, Effort(0, 0))
    assert note == "the traces of 1 of 4 layers are below 0 and count as 0"
    assert (cost.images, cost.steps) == (len(bench.splits.calibrations[0]), 7)
    first, below, *_ = bench.weight_errors
    assert means[0] == pytest.approx({each: 8 / params[0] * error for each, error in first.items()})
    assert means[1] == dict.fromkeys(below, 0)


@pytest.mark.parametrize(("kind", "estimate"), [("eigenvalues", top_eigenvalues), ("traces", traces)])
def test_what_is_known_of_a_hessian_goes_on_where_it_was_interrupted(
    kind: Kind, estimate: Any, splits: Splits, tmp_path: Path
) -> None:
    whole = curvature(opened(Residual(), splits, tmp_path / "whole", "3bit"), kind, estimate, 0)
    computed: list[int] = []

    def until(last: int) -> Any:
        def estimated(loss: Loss, seed: int, recall: Recall) -> Any:
            def counted(index: int, compute: Callable[[], tuple[float, int]]) -> tuple[float, int]:
                if index > last:
                    raise KeyboardInterrupt
                return recall(index, lambda: (computed.append(index), compute())[1])

            return estimate(loss, seed, counted)

        return estimated

    bench = opened(Residual(), splits, tmp_path / "parts", "3bit")
    for last in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            curvature(bench, kind, until(last), 0)
    found = curvature(bench, kind, until(3), 0)
    assert found.value == whole.value
    assert computed == [0, 1, 2, 3]
    each = [bench.once([kind, VERSIONS[kind], 0, "of layer", index], pytest.fail).seconds for index in range(4)]
    assert found.seconds >= sum(each) - 1e-6, "those before the interruptions too"


def test_names() -> None:
    assert named(["all"]) == list(RULES)
    assert named(["fast"]) == ["uniform", "random_scores", "earlier", "weight_error", "layer_error"]
    assert named(["hawq", "uniform", "hawq"]) == ["uniform", "hawq"]
    for wrong, near in (("hawqv2", "hawq_v2"), ("Synflow", "synflow"), ("fats", "fast")):
        with pytest.raises(BaselineMistake, match=rf"^'{wrong}' is no baseline: perhaps {near}; give all, fast, or"):
            named([wrong])


def test_more_bits_never_lose_more_and_a_greater_gain_gets_them_first(bench: Bench) -> None:
    for name, rows in losses(bench, 0, left_out=pytest.fail).items():
        assert all(row == sorted(row, reverse=True) for row in rows), name
    gains = by_gains([1.0, 3.0])
    assert gains(1, 2, 8) - gains(1, 4, 8) == 3 * (gains(0, 2, 8) - gains(0, 4, 8)) > 0


def test_inputs_count_as_weights_do_where_their_bits_are_to_be_chosen_too(
    network: DigitsCNN, splits: Splits, cache: Path
) -> None:
    task = Task(Choices((2, 4, 8), (2, 4, 8)), Budget.parse("0.0016GBOPs"))
    bench = Bench("digits", network, splits, task, Ledger(cache / "ledger.sqlite"))
    for each in baselines(bench, 0, ["every_error", "hawq_v2", "hawq_v3"]):
        assert bench.searched(each.allocations[0]).kl < 0.5
