"""How steps of a search are written: packed and sealed, and what many of them hold once, beside them.

A step holds every candidate so far, and the jobs of a generation what all its agents may see. Each of these is a part,
a row of its own that is named by its content, so that a step grows by nine bytes a candidate, and not by all of it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.types import Send

from tap_eval import sealed

_TABLE = "CREATE TABLE IF NOT EXISTS parts (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, content BLOB NOT NULL)"
_CANDIDATES = "candidates"
"""the channel whose values are parts"""
_SHARED = ("known", "judged", "library")
"""what of a job is a part"""
_VALUES = "channel_values"
Damage = sealed.Damage


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
        self._rows = {row for (row,) in database.execute("SELECT id FROM parts")}
        self._ids: dict[int, tuple[Any, int]] = {}
        """of parts by what Python calls them, which are held so that nothing else is called so"""

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        kind, content = super().dumps_typed(self._taken_apart(obj))
        content = zlib.compress(content, 1)  # code and thoughts, to about a fifth
        return f"{kind} {sealed.VERSION} {sealed.digest(content)}", content

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """Raises `Damage`."""
        kind, _, seal = data[0].partition(" ")
        if seal and seal != f"{sealed.VERSION} {sealed.digest(data[1])}":
            raise Damage("holds a step that is not what was written")
        return self._put_together(super().loads_typed((kind, zlib.decompress(data[1]) if seal else data[1])))

    def hold(self, checkpoint: Mapping[str, Any], others: bool) -> None:
        """Knows from now on what parts a step has, and no other; takes the `others` out of the database, or not."""
        with self._lock:
            self._ids = {id(part): self._ids[id(part)] for part in _parts(checkpoint) if id(part) in self._ids}
            if others:
                held = {row for _, row in self._ids.values()}
                gone = [(row,) for row in self._rows - held]
                self._database.executemany("DELETE FROM parts WHERE id = ?", gone)
                self._rows = held

    def _taken_apart(self, obj: Any) -> Any:
        if _is_job(obj):
            sent = copy(obj)
            sent.arg = {**obj.arg, **{name: self._row(obj.arg[name]) for name in _SHARED}}
            return sent
        if not isinstance(obj, dict) or _VALUES not in obj:
            return obj
        values = {
            name: [self._taken_apart(each) for each in value] if isinstance(value, list) else value
            for name, value in obj[_VALUES].items()
        }
        if isinstance(records := values.get(_CANDIDATES), dict):
            values[_CANDIDATES] = [self._row(record) for record in records.values()]
        return {**obj, _VALUES: values}

    def _put_together(self, obj: Any) -> Any:
        if _is_job(obj) and isinstance(obj.arg[_SHARED[0]], int):  # those of before there were parts are whole
            obj.arg = {**obj.arg, **dict(zip(_SHARED, self._read([obj.arg[name] for name in _SHARED]), strict=True))}
        elif isinstance(obj, dict) and _VALUES in obj:
            values = obj[_VALUES]
            for value in values.values():
                for each in value if isinstance(value, list) else ():
                    self._put_together(each)
            if isinstance(rows := values.get(_CANDIDATES), list):
                values[_CANDIDATES] = {record["name"]: record for record in self._read(rows)}
        return obj

    def _row(self, part: Any) -> int:
        """Of a part, which is written unless it is there."""
        with self._lock:
            if (known := self._ids.get(id(part))) is not None:
                return known[1]
            kind, content = super().dumps_typed(part)
            row = _named(content)
            if row not in self._rows:
                packed = zlib.compress(content, 1)
                self._database.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", (row, kind, packed))
                self._rows.add(row)
            self._ids[id(part)] = part, row
            return row

    def _read(self, rows: Sequence[int]) -> Iterator[Any]:
        """Raises `Damage`."""
        found = self._database.execute(
            "SELECT id, kind, content FROM parts WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(rows),)
        )
        parts = {row: (kind, content) for row, kind, content in found}
        for row in rows:
            kind, packed = parts.get(row, ("", b""))
            try:
                content = zlib.decompress(packed)
            except zlib.error as error:
                raise Damage("lacks what a step holds") from error
            if _named(content) != row:
                raise Damage("holds a part of a step that is not what was written")
            yield super().loads_typed((kind, content))


def _parts(checkpoint: Mapping[str, Any]) -> Iterator[Any]:
    """What of a step is a part."""
    for value in checkpoint[_VALUES].values():
        for job in filter(_is_job, value if isinstance(value, list) else ()):
            yield from (job.arg[name] for name in _SHARED)
    if isinstance(records := checkpoint[_VALUES].get(_CANDIDATES), dict):
        yield from records.values()


def _is_job(value: object) -> bool:
    """Whether it is sent to an agent of a search."""
    return isinstance(value, Send) and isinstance(value.arg, dict) and {*_SHARED} <= value.arg.keys()


def _named(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], signed=True)
