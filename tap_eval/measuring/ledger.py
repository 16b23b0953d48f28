"""Measurements on disk, keyed by content, so that nothing is measured twice.

The ledger, not a run's checkpoint, is the source of truth: a value is committed before
`recall` returns it. Who measures a key holds a lease on it and renews it, wherever it runs;
others wait for the value, and take over when the lease runs out.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

_SCHEMA = """
CREATE TABLE IF NOT EXISTS measurements (key TEXT PRIMARY KEY, value TEXT, owner TEXT, claimed REAL)
"""
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


class Ledger:
    """A table of measurements in one SQLite file, safe for threads and processes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.measured = 0
        """how many values this object had to compute"""
        self._owner = uuid.uuid4().hex
        with self._database() as database:
            database.execute(_SCHEMA)

    def recall(self, key: str, measure: Callable[[], Any]) -> Any:
        """The JSON value under `key`; `measure()` supplies it, once, if there is none."""
        while (value := self._value(key)) is None and not self._claim(key):
            time.sleep(0.2)
        if value is None:
            try:
                with self._renewed(key):
                    value = json.dumps(measure())
            except BaseException:
                self._write("DELETE FROM measurements WHERE key = ? AND owner = ? AND value IS NULL", key, self._owner)
                raise
            self._write("UPDATE measurements SET value = ? WHERE key = ?", value, key)
            self.measured += 1
        return json.loads(value)

    def timed(self, key: str, measure: Callable[[], Value]) -> Timed[Value]:
        """The same, with the seconds that `measure()` took."""

        def both() -> tuple[Value, float]:
            began = time.perf_counter()
            return measure(), time.perf_counter() - began

        return Timed(*self.recall(key, both))

    def _value(self, key: str) -> str | None:
        with self._database() as database:
            row = database.execute("SELECT value FROM measurements WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def _claim(self, key: str) -> bool:
        """Whether it is ours to measure `key`: nobody has claimed it, or the claimant's lease has run out."""
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            row = database.execute("SELECT value, claimed FROM measurements WHERE key = ?", (key,)).fetchone()
            if row and (row[0] is not None or time.time() - row[1] < _LEASE_SECONDS):
                return False
            database.execute(
                "INSERT OR REPLACE INTO measurements VALUES (?, NULL, ?, ?)", (key, self._owner, time.time())
            )
            return True

    @contextmanager
    def _renewed(self, key: str) -> Iterator[None]:
        """Keeps our lease on `key` from running out."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(_LEASE_SECONDS / 5):
                self._write(
                    "UPDATE measurements SET claimed = ? WHERE key = ? AND owner = ?", time.time(), key, self._owner
                )

        renewing = threading.Thread(target=renew, daemon=True)
        renewing.start()
        try:
            yield
        finally:
            done.set()
            renewing.join()

    def _write(self, statement: str, *values: object) -> None:
        with self._database() as database:
            database.execute(statement, values)

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own, committed at the end: threads share nothing."""
        with closing(sqlite3.connect(self.path, timeout=60)) as database, database:
            database.execute("PRAGMA synchronous=FULL")
            yield database
