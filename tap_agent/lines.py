"""Searches as LangGraph threads: a thread is a tree of checkpoints, and each run folder holds one line of it.

A line goes from the root of its thread to a tip. The folders of a thread, read together, are
the whole tree; each alone is a run like any other, which the command line resumes and reports.
What is written after the tip of a line that has not ended goes on in its folder. What is
written anywhere else is a fork, and gets a folder of its own, which begins with the
checkpoints, events and proxies up to there: nothing that a run has found is written over.
"""

from __future__ import annotations

import datetime
import json
import sqlite3
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from langgraph.checkpoint.sqlite import SqliteSaver

from tap_agent.folder import RunFolder, runs, usual_path
from tap_agent.session import SERDE, first_event
from tap_agent.settings import Settings, read_settings
from tap_eval.mistake import Mistake

_OTHERS = """
WITH RECURSIVE line(id) AS (
    VALUES (:checkpoint)
    UNION
    SELECT parent_checkpoint_id FROM checkpoints, line
    WHERE checkpoint_ns = '' AND checkpoint_id = id AND parent_checkpoint_id IS NOT NULL
)
DELETE FROM checkpoints WHERE checkpoint_ns != '' OR checkpoint_id NOT IN line
"""
"""takes away what is not on the line to a checkpoint"""
CHANGEABLE = {"max_cost", "max_calls", "max_minutes", "executor", "address"}
"""the settings that a run may go on with anew, as with `tap-agent resume`"""


class ThreadMistake(Mistake):
    """Something that a thread cannot do, being a search."""

    kind = "run"


class Tip(NamedTuple):
    """The end of a line."""

    thread: str
    checkpoint: str


class Writing:
    """The run folder that one access of a server writes to: found or made, and held, when it is first needed.

    Its events and checkpoints may come from any thread. After `close` nothing is written any
    more, whatever is still running.
    """

    def __init__(
        self,
        thread: str,
        settings: Settings,
        find: Callable[[], RunFolder],
        first: Mapping[str, Any] | None,
        begun: bool,
    ) -> None:
        """`first` is the event that the folder is given before all others."""
        self.thread = thread
        self.settings = settings
        self._find = find
        self._first = first
        self._begun = begun
        self._finding = threading.Lock()
        self._held = ExitStack()
        self._folder: RunFolder | None = None
        self._over: Exception | None = None

    def folder(self) -> RunFolder:
        """The folder; raises `RunMistake` when another process is writing there."""
        with self._finding:
            if self._over:
                raise self._over
            if self._folder is None:
                folder = self._find()
                self._held.enter_context(folder.held())
                if self._first:
                    folder.record(dict(self._first))
                self._folder = folder
            return self._folder

    def admit(self, source: str) -> None:
        """Raises `ThreadMistake` for the input of a search that has begun; nothing is written after it."""
        if source == "input" and self._begun:
            self._over = ThreadMistake(
                f"thread {self.thread} is a search that has begun: go on without an input, fork it from one of its "
                "checkpoints, or start a new thread."
            )
            raise self._over

    def database(self) -> Path:
        """Where its checkpoints go."""
        return self.folder().checkpoints

    def close(self) -> None:
        """Lets go of the folder."""
        with self._finding:
            self._over = self._over or RuntimeError("the session of this search is over")
            self._held.close()


def begin(folder: Path, thread: str, given: Mapping[str, Any]) -> Writing:
    """A new search under `folder`, with the settings that are `given`; raises `ConfigMistake`."""
    settings = read_settings(None, given)
    first = first_event("started", thread, settings)
    place = folder / usual_path(settings).name
    return Writing(thread, settings, lambda: RunFolder.unused(place, settings), first, begun=False)


def go_on(
    lines: Sequence[RunFolder], thread: str, checkpoint: str | None, given: Mapping[str, Any], *, session: bool
) -> Writing:
    """The search of a thread, after that checkpoint or its newest, in the same folder or in a fork of it.

    `session` tells a run of the graph from a change of its state. Of the settings only `CHANGEABLE`
    may be `given` anew; raises `ThreadMistake` for others, and `RunMistake` when another process
    is writing there.
    """
    ends = {folder: tip.checkpoint for folder in lines if (tip := tip_of(folder))}
    newest = max(ends, key=ends.__getitem__)
    if checkpoint is None:
        folder, checkpoint = newest, ends[newest]
    else:
        holding = [each for each in ends if _holds(each, checkpoint)]
        if not holding:
            raise ThreadMistake(f"thread {thread} has no checkpoint {checkpoint}: take one of its history.")
        folder = next((each for each in holding if ends[each] == checkpoint), holding[0])
    settings = _with(given, folder)
    first = first_event("resumed", thread, settings) if session else None
    if ends[folder] == checkpoint and not folder.has_ended():
        writing = Writing(thread, settings, lambda: folder, first, begun=True)
        writing.folder()
        return writing
    return Writing(thread, settings, lambda: fork(folder, checkpoint), first, begun=True)


def fork(origin: RunFolder, checkpoint: str) -> RunFolder:
    """A new run beside `origin`, which has come as far as that checkpoint of it."""
    folder = RunFolder.unused(origin.path.with_name(f"{origin.name}-fork"), origin.settings())
    with (
        closing(sqlite3.connect(origin.checkpoints)) as source,
        SqliteSaver.from_conn_string(str(folder.checkpoints)) as saver,
    ):
        saver.serde = SERDE
        source.backup(saver.conn)
        known = {"checkpoint": checkpoint}
        saver.conn.execute(_OTHERS, known)
        saver.conn.execute(
            "DELETE FROM writes WHERE checkpoint_ns != '' OR checkpoint_id = :checkpoint "
            "OR checkpoint_id NOT IN (SELECT checkpoint_id FROM checkpoints)",
            known,
        )
        saver.conn.commit()
        (found,) = saver.list(None, limit=1)
    until = datetime.datetime.fromisoformat(found.checkpoint["ts"])
    for event in origin.events():
        if datetime.datetime.fromisoformat(event["at"]) <= until:
            folder.record(event)
    folder.record({"event": "forked", "run": origin.name, "checkpoint": checkpoint, "line": str(uuid.uuid4())})
    _copy_calls(origin, folder)
    return folder


def _copy_calls(origin: RunFolder, folder: RunFolder) -> None:
    """Those for the candidates that the fork has: what they cost counts, and a replay needs their answers."""
    names = [event["name"] for event in folder.events() if event["event"] == "proposed"]
    if origin.calls.exists():
        with (
            closing(sqlite3.connect(origin.calls)) as source,
            closing(sqlite3.connect(folder.calls, isolation_level=None)) as target,
        ):
            source.backup(target)
            target.execute("DELETE FROM calls WHERE name NOT IN (SELECT value FROM json_each(?))", [json.dumps(names)])


def lines(folder: Path, thread: str) -> list[RunFolder]:
    """The runs under `folder` that are lines of a thread, the oldest first."""
    found = [(each, tip_of(each)) for each in reversed(runs(folder))]
    return [each for each, tip in found if tip and tip.thread == thread]


def tip_of(folder: RunFolder) -> Tip | None:
    """Where a run has come to, once it has a checkpoint."""
    rows = ask(
        folder.checkpoints,
        "SELECT thread_id, checkpoint_id FROM checkpoints WHERE checkpoint_ns = '' ORDER BY checkpoint_id DESC LIMIT 1",
    )
    return Tip(*rows[0]) if rows else None


def _holds(folder: RunFolder, checkpoint: str) -> bool:
    sql = "SELECT 1 FROM checkpoints WHERE checkpoint_ns = '' AND checkpoint_id = ?"
    return bool(ask(folder.checkpoints, sql, checkpoint))


def ask(database: Path, sql: str, *parameters: str) -> list[Any]:
    """What a database answers; nothing from one that is not there, has no tables yet, or is none."""
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute(sql, parameters).fetchall()
    except sqlite3.DatabaseError as error:
        if any(words in str(error) for words in ("no such table", "unable to open", "not a database", "malformed")):
            return []
        raise


def _with(given: Mapping[str, Any], folder: RunFolder) -> Settings:
    """The settings of a run, with what is given of the changeable; raises `ThreadMistake`."""
    settings, asked = folder.settings(), read_settings(None, given)
    changed = {name: getattr(asked, name) for name in CHANGEABLE & given.keys()}
    for name, field in Settings.model_fields.items():
        value, own = getattr(asked, name), getattr(settings, name)
        if name not in changed and value not in (field.default, own):
            raise ThreadMistake(
                f"{name} = {value!r} is not that of {folder.name}, where it is {own!r} for good: leave it out, or "
                "start a new thread."
            )
    return settings.model_copy(update=changed)
