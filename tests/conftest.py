"""The digits network with its images, trained once a session, and a ledger for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.images.images import Splits
from tap_eval.images.sources import digits, split
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.networks.digits import DigitsCNN, load_digits_cnn
from tools.sandbox import MontySandbox

os.environ["COLUMNS"] = "160"  # before anything prints, whichever test is a worker's first


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that the whole session shares, with the trained network in it."""
    folder = tmp_path_factory.mktemp("cache")
    load_digits_cnn(folder)
    return folder


@pytest.fixture
def network(cache: Path) -> DigitsCNN:
    return load_digits_cnn(cache)


@pytest.fixture(scope="session")
def splits() -> Splits:
    return split(digits(), calibration=None, seed=0, draws=2, search=300, test=300)


@pytest.fixture
def bench(network: DigitsCNN, splits: Splits, cache: Path) -> Bench:
    return Bench("digits", network, splits, Task(Choices(), Budget.parse("3bit")), Ledger(cache / "ledger.sqlite"))


@pytest.fixture
def channel_bench(network: DigitsCNN, splits: Splits, cache: Path) -> Bench:
    """The same with bits for groups of channels."""
    task = Task(Choices(channel_groups=4), Budget.parse("3bit"))
    return Bench("digits", network, splits, task, Ledger(cache / "ledger.sqlite"))


@pytest.fixture(scope="session")
def sandbox() -> Iterator[MontySandbox]:
    with MontySandbox() as opened:
        yield opened
