"""What is measured is kept, once, whoever asks and whatever fails."""

from __future__ import annotations

import sqlite3
import threading
import time
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


def test_seconds_are_of_what_is_kept_and_not_of_what_goes_before(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert not ledger.holds("key")
    found = ledger.timed("key", lambda: 7, lambda: time.sleep(0.5))
    assert (found.value, found.seconds < 0.5, ledger.holds("key")) == (7, True, True)
    assert ledger.timed("key", pytest.fail, pytest.fail) == found


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


def test_a_clock_of_another_day_blocks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tap_eval.measuring.ledger._LEASE_SECONDS", 0.5)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    with sqlite3.connect(ledger.path) as database:  # of a process that ended, whose clock nobody knows
        database.execute("INSERT INTO ledger VALUES ('key', NULL, NULL, 'theirs')")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert ledger.recall("key", lambda: 3) == 3


def test_a_value_that_was_changed_or_cut_is_measured_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for key, change in {"flipped": "[1, 2, 4]", "cut": "[1, 2", "empty": ""}.items():
        ledger.recall(key, lambda: [1, 2, 3])
        with sqlite3.connect(ledger.path) as database:
            database.execute("UPDATE ledger SET value = ? WHERE key = ?", (change, key))
        assert ledger.recall(key, lambda: [1, 2, 3]) == [1, 2, 3]
    with sqlite3.connect(ledger.path) as database:  # another key's
        database.execute("UPDATE ledger SET key = 'mine' WHERE key = 'cut'")
    assert ledger.recall("mine", lambda: 9) == 9


@pytest.mark.parametrize("damage", ["cut", "text", "flipped"])
def test_a_damaged_file_is_put_aside_and_all_is_measured_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    for number in range(200):
        ledger.recall(f"key {number}", lambda number=number: [number] * 100)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "text": b"nothing" * 999,
            "flipped": whole[:5000] + b"\xff" * 5000 + whole[10000:],
        }[damage]
    )
    with pytest.warns(UserWarning, match="is not what was written .* all is measured anew"):
        again = Ledger(path)
    assert again.recall("key 7", lambda: 8) == 8
    assert path.with_name("ledger.sqlite.damaged").exists()


def die_while_measuring(path: Path) -> None:
    import os

    Ledger(path).recall("key", lambda: os._exit(1))
