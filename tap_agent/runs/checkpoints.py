"""Searches as LangGraph threads: a thread is a tree of checkpoints, and each run folder holds one branch of it.

A branch goes from the root of its thread to a tip. The folders of a thread, read together, are
the whole tree; each alone is a run like any other, which the command line resumes and reports.
What is written after the tip of a branch that has not ended goes on in its folder. What is
written anywhere else is a fork, and gets a folder of its own, which begins with the
checkpoints, events and proxies up to there: nothing that a run has found is written over.
"""

from __future__ import annotations

import datetime
import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.sqlite import SqliteSaver

from agents.notebook import name_of
from tap_agent.runs.folder import RunFolder, runs
from tap_agent.runs.parts import Serializer
from tap_eval import sealed
from tap_eval.storage import RUN, writing

Keep = Literal["last", "all"]


class Checkpoints(SqliteSaver):
    """The steps of one search: the last alone, from which it goes on, or all."""

    def __init__(self, path: Path, connection: sqlite3.Connection, keep: Keep) -> None:
        lock = threading.RLock()
        self._serializer = Serializer(connection, lock)
        super().__init__(connection, serde=self._serializer)
        self.lock = lock  # type: ignore[assignment] # one that whoever holds it may take again
        self.path = path
        self._keep = keep

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Raises `StorageMistake`."""
        with writing(self.path, RUN), self.lock:
            written = super().put(config, checkpoint, metadata, new_versions)
            if self._keep == "last" and not config["configurable"]["checkpoint_ns"]:
                with self.cursor() as cursor:  # not by their order, which a clock may have given
                    for table in ("checkpoints", "writes"):
                        cursor.execute(f"DELETE FROM {table} WHERE checkpoint_id != ?", (checkpoint["id"],))  # noqa: S608
                    self._serializer.drop()
        return written

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Raises `StorageMistake`."""
        with writing(self.path, RUN):
            super().put_writes(config, writes, task_id, task_path)


@contextmanager
def opened(path: Path, keep: Keep = "all") -> Iterator[Checkpoints]:
    """The checkpoints in the database at `path`; raises `StorageMistake` where it cannot be written."""
    with ExitStack() as held:
        with writing(path, RUN):
            connection = held.enter_context(closing(sqlite3.connect(path, check_same_thread=False, timeout=60)))
            saver = Checkpoints(path, connection, keep)
            saver.setup()
            sealed.mark_database(connection)
        yield saver


def check(path: Path, next_step: str) -> None:
    """Raises `DamagedMistake`, with `next_step`, unless the last steps in a database can be gone on with."""
    sealed.check_database(path, next_step)
    threads = query(path, "SELECT DISTINCT thread_id FROM checkpoints WHERE checkpoint_ns = ''")
    if not threads:
        return
    try:
        with opened(path) as saver:
            for (thread,) in threads:
                saver.get_tuple({"configurable": {"thread_id": thread, "checkpoint_ns": ""}})
    except (ValueError, NotImplementedError, sqlite3.DatabaseError) as error:
        if isinstance(error, sqlite3.Error) and not sealed.is_damage(error):
            raise
        raise sealed.damaged(path, error, next_step) from error


_OTHERS = """
WITH RECURSIVE branch(id) AS (
    VALUES (:checkpoint)
    UNION
    SELECT parent_checkpoint_id FROM checkpoints, branch
    WHERE checkpoint_ns = '' AND checkpoint_id = id AND parent_checkpoint_id IS NOT NULL
)
DELETE FROM checkpoints WHERE checkpoint_ns != '' OR checkpoint_id NOT IN branch
"""
"""takes away what is not on the branch to a checkpoint"""


class Tip(NamedTuple):
    """The end of a branch."""

    thread: str
    checkpoint: str


def fork(origin: RunFolder, checkpoint: str) -> RunFolder:
    """A new run beside `origin`, which has come as far as that checkpoint of it."""
    place = origin.path.with_name(f"{origin.name}-fork")
    folder = RunFolder.unused(place, origin.settings({"keep_checkpoints": "all"}))
    with closing(sqlite3.connect(origin.checkpoints)) as source, opened(folder.checkpoints) as saver:
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
    """Those for candidates and notebook of the fork: what they cost counts, and a replay needs their answers."""
    told = folder.events()
    names = [event["name"] for event in told if event["event"] == "proposed"]
    names += [name_of(event["generation"]) for event in told if event["event"] == "reflected"]
    if origin.calls.exists():
        with (
            closing(sqlite3.connect(origin.calls)) as source,
            closing(sqlite3.connect(folder.calls, isolation_level=None)) as target,
        ):
            source.backup(target)
            target.execute("DELETE FROM calls WHERE name NOT IN (SELECT value FROM json_each(?))", [json.dumps(names)])


def branches(folder: Path, thread: str) -> list[RunFolder]:
    """The runs under `folder` that are branches of a thread, the oldest first."""
    found = [(each, tip_of(each)) for each in reversed(runs(folder))]
    return [each for each, tip in found if tip and tip.thread == thread]


def tip_of(folder: RunFolder) -> Tip | None:
    """Where a run has come to, once it has a checkpoint."""
    rows = query(
        folder.checkpoints,
        "SELECT thread_id, checkpoint_id FROM checkpoints WHERE checkpoint_ns = '' ORDER BY checkpoint_id DESC LIMIT 1",
    )
    return Tip(*rows[0]) if rows else None


def holds(folder: RunFolder, checkpoint: str) -> bool:
    """Whether a checkpoint of a search is in that folder."""
    sql = "SELECT 1 FROM checkpoints WHERE checkpoint_ns = '' AND checkpoint_id = ?"
    return bool(query(folder.checkpoints, sql, checkpoint))


def query(database: Path, sql: str, *parameters: str) -> list[Any]:
    """What a database answers; nothing from one that is not there, has no tables yet, or is none."""
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute(sql, parameters).fetchall()
    except sqlite3.DatabaseError as error:
        if any(words in str(error) for words in ("no such table", "unable to open", "not a database", "malformed")):
            return []
        raise


def conversations(folder: RunFolder) -> list[str]:
    """The threads of a run's conversations."""
    return [thread for (thread,) in query(folder.conversations, "SELECT DISTINCT thread_id FROM checkpoints")]
