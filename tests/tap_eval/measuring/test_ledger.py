"""What is measured is kept, once, whoever asks and whatever fails."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tap_eval.measuring.ledger import Ledger


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


def test_a_claim_of_a_process_that_has_ended_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tap_eval.measuring.ledger._LEASE_SECONDS", 0.5)
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
