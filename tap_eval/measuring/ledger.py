"""Measurements on disk, keyed by content, so that nothing is measured twice.

The ledger, not a run's checkpoint, is the source of truth: a value is committed before
`recall` returns it. Who measures a key holds a lease on it and renews it, wherever it runs;
others wait for the value, and take over once they have seen no renewal for so long. No clock
is compared with another's. A value that is not what was kept is measured again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from tap_eval.mistake import DamagedMistake
from tap_eval.sealed import check_database, digest, mark_database
from tap_eval.storage import CACHE, writing

_SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (key TEXT PRIMARY KEY, value TEXT, digest TEXT, lease TEXT)
"""
"""`lease` is another text with each renewal, and none once there is a value; `digest` is of key and value"""
_LEASE_SECONDS = 10.0
Value = TypeVar("Value")


class Timed(NamedTuple, Generic[Value]):
    """A value, and the seconds that it took when it was computed."""

    value: Value
    seconds: float


def key(*parts: object) -> str:
    """A name for content: the hash of the JSON of `parts`."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(key: str, value: str) -> str:
    return digest(f"{key} {value}".encode())


class Ledger:
    """A table of measurements in one SQLite file, safe for threads and processes."""

    def __init__(self, path: Path) -> None:
        """Raises `StorageMistake` where there can be no file at `path`, and `DamagedMistake` of a newer version's."""
        with writing(path, CACHE):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.measured = 0
        """how many values this object had to compute"""
        self._begin()

    def recall(self, key: str, measure: Callable[[], Any]) -> Any:
        """The JSON value under `key`; `measure()` supplies it, once, if there is none."""
        seen, since = None, time.monotonic()
        while True:
            value, lease = self._row(key)
            if value is not None:
                return json.loads(value)
            if lease != seen:
                seen, since = lease, time.monotonic()
            if lease is None or time.monotonic() - since >= _LEASE_SECONDS:
                mine = self._claimed(key, lease)
                if mine is not None:
                    return self._measured(key, mine, measure)
            time.sleep(0.2)

    def _measured(self, key: str, lease: str, measure: Callable[[], Any]) -> Any:
        with self._renewed(key, lease) as held:
            try:
                value = json.dumps(measure())
            except BaseException:
                self._write("DELETE FROM ledger WHERE key = ? AND lease = ?", key, held())
                raise
        row = key, value, _digest(key, value)
        self._write("INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, NULL)", *row)
        self.measured += 1
        return json.loads(value)

    def timed(self, key: str, measure: Callable[[], Value], ready: Callable[[], None] = lambda: None) -> Timed[Value]:
        """The same, with the seconds that `measure()` took, which `ready()` goes before."""

        def both() -> tuple[Value, float]:
            ready()
            began = time.perf_counter()
            return measure(), time.perf_counter() - began

        return Timed(*self.recall(key, both))

    def holds(self, key: str) -> bool:
        """Whether there is a value under `key`."""
        return self._row(key)[0] is not None

    def _row(self, key: str) -> tuple[str | None, str | None]:
        """The value under `key` and the lease on it, each None where there is none, or it is not what was kept."""
        with self._database() as database:
            row = database.execute("SELECT value, digest, lease FROM ledger WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None, None
        value, digest, lease = row
        return (value, None) if value is not None and digest == _digest(key, value) else (None, lease)

    def _claimed(self, key: str, seen: str | None) -> str | None:
        """Our lease on `key`, if nobody has claimed it or renewed the lease that was `seen` meanwhile."""
        lease = uuid.uuid4().hex
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            row = database.execute("SELECT value, digest, lease FROM ledger WHERE key = ?", (key,)).fetchone()
            whole = row and row[0] is not None and row[1] == _digest(key, row[0])
            if whole or (row and row[2] != seen):
                return None
            database.execute("INSERT OR REPLACE INTO ledger VALUES (?, NULL, NULL, ?)", (key, lease))
        return lease

    @contextmanager
    def _renewed(self, key: str, lease: str) -> Iterator[Callable[[], str]]:
        """Keeps our lease on `key` from running out; gives what it is by now."""
        done, leases = threading.Event(), [lease]

        def renew() -> None:
            while not done.wait(_LEASE_SECONDS / 5):
                fresh = uuid.uuid4().hex
                self._write("UPDATE ledger SET lease = ? WHERE key = ? AND lease = ?", fresh, key, leases[-1])
                leases.append(fresh)

        renewing = threading.Thread(target=renew, daemon=True)
        renewing.start()

        def ended() -> str:
            done.set()
            renewing.join()
            return leases[-1]

        try:
            yield ended
        finally:
            ended()

    def _begin(self) -> None:
        """Makes the table where there is none; a file that is damaged is put aside, for what is in it can be measured
        again."""
        aside = self.path.with_name(f"{self.path.name}.damaged")
        try:
            check_database(self.path, f"it is {aside.name} now, and all is measured anew")
        except DamagedMistake as mistake:
            if mistake.newer:
                raise
            self.path.replace(aside)
            warnings.warn(str(mistake), stacklevel=3)
        with self._database() as database:
            database.execute(_SCHEMA)
            mark_database(database)

    def _write(self, statement: str, *values: object) -> None:
        with self._database() as database:
            database.execute(statement, values)

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own, committed at the end: threads share nothing."""
        with writing(self.path, CACHE), closing(sqlite3.connect(self.path, timeout=60)) as database, database:
            database.execute("PRAGMA synchronous=FULL")
            yield database
