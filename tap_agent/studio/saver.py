"""The LangGraph server's checkpoints, in the run folders: each thread is read and written where it belongs.

The server takes one saver for all threads. This one looks a thread up in the databases of all
runs, so that what the command line writes is seen at once, and writes to the database that the
access at hand names (see `RunSaver.writing`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)

from tap_agent.runs.checkpoints import Checkpoints, opened, query
from tap_agent.runs.folder import runs
from tap_agent.studio.writer import ThreadMistake


class Place(Protocol):
    """Where the checkpoints of one access go."""

    def admit(self, source: str) -> None:
        """Raises when no checkpoint of that source (input, loop, update, fork) may come now."""

    def database(self) -> Path:
        """The database; may take its time."""


@contextmanager
def _read(database: Path) -> Iterator[Checkpoints]:
    """As it is now, whatever another process writes meanwhile."""
    with opened(database) as saver:
        saver.conn.execute("BEGIN")
        yield saver


class _Access:
    """One access that writes: its database, opened with the first write."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._opening = threading.Lock()
        self._held = ExitStack()
        self._saver: Checkpoints | None = None

    def saver(self) -> Checkpoints:
        with self._opening:
            path = self.place.database()
            if self._saver is None:
                self._saver = self._held.enter_context(opened(path))
            return self._saver

    def close(self) -> None:
        with self._opening:
            self._held.close()


class RunSaver(BaseCheckpointSaver[str]):
    """The checkpoints of all threads of the runs under a folder.

    A thread that is deleted is taken off the server's list alone: the run stays.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._accesses: dict[str, _Access] = {}

    @asynccontextmanager
    async def writing(self, thread: str, place: Place) -> AsyncIterator[None]:
        """Lets `thread` be written, to where it is told; raises `ThreadMistake` while another access writes it."""
        if thread in self._accesses:
            raise ThreadMistake(f"thread {thread} is being written: wait until that has ended.")
        access = _Access(place)
        self._accesses[thread] = access
        try:
            yield
        finally:
            del self._accesses[thread]
            await asyncio.to_thread(access.close)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await asyncio.to_thread(self._newest, config)

    def _newest(self, config: RunnableConfig) -> CheckpointTuple | None:
        newest: CheckpointTuple | None = None
        for database in self._databases(config):
            with _read(database) as saver:
                found = saver.get_tuple(config)
            if found and (newest is None or found.checkpoint["id"] > newest.checkpoint["id"]):
                newest = found
        return newest

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        listed = partial(self._listed, config, filter=filter, before=before, limit=limit)
        for each in await asyncio.to_thread(listed):
            yield each

    def _listed(self, config: RunnableConfig | None, *, limit: int | None, **which: Any) -> list[CheckpointTuple]:
        found: dict[tuple[str, str], CheckpointTuple] = {}
        for database in self._databases(config):
            with _read(database) as saver:
                for each in saver.list(config, limit=limit, **which):
                    found.setdefault((each.checkpoint["id"], each.config["configurable"]["checkpoint_ns"]), each)
        return [found[key] for key in sorted(found, reverse=True)[:limit]]

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        access = self._access(config)
        if not config["configurable"]["checkpoint_ns"]:  # else it is that of a graph which a node has invoked
            access.place.admit(metadata["source"])

        def put() -> RunnableConfig:
            return access.saver().put(config, checkpoint, metadata, new_versions)

        return await asyncio.to_thread(put)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        access = self._access(config)
        await asyncio.to_thread(lambda: access.saver().put_writes(config, writes, task_id, task_path))

    async def adelete_thread(self, thread_id: str) -> None:
        """Leaves the run where it is."""

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Raises `ValueError`, which the server passes on."""
        raise ValueError(f"thread {source_thread_id} is kept in a run and is not copied: fork it from a checkpoint.")

    def _access(self, config: RunnableConfig) -> _Access:
        thread = str(config["configurable"]["thread_id"])
        if (access := self._accesses.get(thread)) is None:
            raise RuntimeError(f"thread {thread} is not being written: its session is over")
        return access

    def _databases(self, config: RunnableConfig | None) -> list[Path]:
        """Those that hold the thread of `config`, the oldest first."""
        files = [path for run in reversed(runs(self._folder)) for path in (run.checkpoints, run.conversations)]
        if config is None:
            return [path for path in files if path.exists()]
        thread = str(config["configurable"]["thread_id"])
        return [path for path in files if query(path, "SELECT 1 FROM checkpoints WHERE thread_id = ? LIMIT 1", thread)]


def lend_waiting(saver: BaseCheckpointSaver[Any]) -> None:
    """Gives a saver that can only be awaited the methods that a graph calls which a sync node invokes.

    Nodes run in threads of their own, and wait there for the loop that calls this.
    """
    loop = asyncio.get_running_loop()

    def wait(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(method(*args, **kwargs), loop).result()

    async def listed(*args: Any, **kwargs: Any) -> list[CheckpointTuple]:
        return [each async for each in saver.alist(*args, **kwargs)]

    methods: dict[str, Callable[..., Any]] = {
        "get_tuple": saver.aget_tuple,
        "put": saver.aput,
        "put_writes": saver.aput_writes,
        "list": listed,
    }
    for name, method in methods.items():
        setattr(saver, name, partial(wait, method))
