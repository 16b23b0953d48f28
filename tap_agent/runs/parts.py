"""How steps of a search are written: packed and sealed, and what many of them hold once, beside them.

A step holds every candidate so far, and the jobs of a generation what all its agents may see. Each of these is a part,
a row of its own whose id is a digest of it, so that a step grows by nine bytes a candidate, and not by all of it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.types import Send

from tap_eval import sealed

_TABLE = """
CREATE TABLE IF NOT EXISTS parts (
    id INTEGER PRIMARY KEY,  -- of name, kind and content
    name TEXT NOT NULL,      -- of the candidate, or of what of a job
    kind TEXT NOT NULL,
    content BLOB NOT NULL
)
"""
_CANDIDATES = "candidates"
"""the channel whose values are parts"""
_SHARED = ("known", "judged", "library")
"""what of a job is a part"""
_VALUES = "channel_values"


class Serializer(JsonPlusSerializer):
    """Packs and seals what it writes, in the name of its type, and refuses what is not what was written.

    Parts are in the database of the steps, and are committed with them; in a step are their ids.
    """

    def __init__(self, database: sqlite3.Connection, lock: threading.RLock) -> None:
        """`lock` is held by whoever writes to the database."""
        super().__init__(allowed_msgpack_modules=[("agents.proposer", "Proposal")])
        self._database = database
        self._lock = lock
        database.execute(_TABLE)
        self._latest: dict[str, tuple[Any, int]] = {}
        """of each name the part that was written last, and its id"""
        self._replaced: set[int] | None = None
        """ids of parts that others have taken the place of; None as long as there may be any from before"""

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        kind, content = super().dumps_typed(self._taken_apart(obj))
        content = zlib.compress(content, 1)  # code and thoughts, to about a fifth
        return f"{kind} {sealed.VERSION} {sealed.digest(content)}", content

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """Raises `Damage`."""
        kind, _, seal = data[0].partition(" ")
        if seal and seal != f"{sealed.VERSION} {sealed.digest(data[1])}":
            raise sealed.Damage("holds a step that is not what was written")
        return self._put_together(super().loads_typed((kind, zlib.decompress(data[1]) if seal else data[1])))

    def drop(self) -> None:
        """Takes out of the database what is not of the step that was written last."""
        if self._replaced is None:
            rows = json.dumps([row for _, row in self._latest.values()])
            self._database.execute("DELETE FROM parts WHERE id NOT IN (SELECT value FROM json_each(?))", (rows,))
        else:
            self._database.executemany("DELETE FROM parts WHERE id = ?", [(row,) for row in self._replaced])
        self._replaced = set()

    def _taken_apart(self, obj: Any) -> Any:
        if _is_job(obj):
            sent = copy(obj)
            sent.arg = {**obj.arg, **{name: self._row(name, obj.arg[name]) for name in _SHARED}}
            return sent
        if not isinstance(obj, dict) or _VALUES not in obj:
            return obj
        values = {name: [*map(self._taken_apart, its)] if _sent(its) else its for name, its in obj[_VALUES].items()}
        if isinstance(records := values.get(_CANDIDATES), dict):
            values[_CANDIDATES] = [self._row(name, record) for name, record in records.items()]
        return {**obj, _VALUES: values}

    def _put_together(self, obj: Any) -> Any:
        if _is_job(obj) and isinstance(obj.arg[_SHARED[0]], int):  # those of before there were parts are whole
            obj.arg = {**obj.arg, **dict(self._read([obj.arg[name] for name in _SHARED]))}
        elif isinstance(obj, dict) and _VALUES in obj:
            values = obj[_VALUES]
            for job in itertools.chain(*filter(_sent, values.values())):
                self._put_together(job)
            if isinstance(rows := values.get(_CANDIDATES), list):
                values[_CANDIDATES] = dict(self._read(rows))
        return obj

    def _row(self, name: str, part: Any) -> int:
        """The id of a part, which is written unless it was the last of that name."""
        with self._lock:
            before = self._latest.get(name)
            if before and before[0] is part:
                return before[1]
            kind, content = super().dumps_typed(part)
            row = _id(name, kind, content)
            packed = zlib.compress(content, 1)
            self._database.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?)", (row, name, kind, packed))
            if before and self._replaced is not None:
                self._replaced.add(before[1])
                self._replaced.discard(row)
            self._latest[name] = part, row
            return row

    def _read(self, rows: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """Parts by their names; raises `Damage`."""
        found = self._database.execute(
            "SELECT id, name, kind, content FROM parts WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(rows),),
        )
        parts = {row: rest for row, *rest in found}
        for row in rows:
            name, kind, packed = parts.get(row, ("", "", b""))
            try:
                content = zlib.decompress(packed)
            except zlib.error as error:
                raise sealed.Damage("lacks a part of a step") from error
            if _id(name, kind, content) != row:
                raise sealed.Damage("holds a part of a step that is not what was written")
            yield name, super().loads_typed((kind, content))


def _sent(value: object) -> bool:
    """Whether it is what is sent in one step."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Send)


def _is_job(value: object) -> bool:
    """Whether it is sent to an agent of a search."""
    return isinstance(value, Send) and isinstance(value.arg, dict) and {*_SHARED} <= value.arg.keys()


def _id(name: str, kind: str, content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(f"{name} {kind} ".encode() + content).digest()[:8], signed=True)
