"""What proxies are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tap_eval.allocation.budget import Budget, spent
from tap_eval.allocation.choices import Choices
from tap_eval.baselines.baselines import baselines
from tap_eval.images.images import Splits
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.networks.digits import DigitsCNN


@pytest.mark.parametrize(("groups", "budget"), [(1, "3bit"), (4, "3bit"), (4, "5511B")])
def test_every_baseline_is_within_the_budget(
    network: DigitsCNN, splits: Splits, cache: Path, groups: int, budget: str
) -> None:
    task = Task(Choices(channel_groups=groups), Budget.parse(budget))
    bench = Bench("digits", network, splits, task, Ledger(cache / "ledger.sqlite"))
    found = baselines(bench, seed=0)
    assert found[0].label == "uniform W3A8"
    for each in found:
        for bits in each.allocations:
            assert spent(bits, bench.layers, task.budget) <= task.budget.limit(bench.layers)
            assert task.budget.unit == "bit" or bench.size(bits).total <= task.budget.amount
    assert len(set(next(each for each in found if len(each.allocations) > 1).allocations)) > 1
