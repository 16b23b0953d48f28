"""What langgraph.json names: the graphs as the server behind LangGraph Studio opens them, and their checkpoints.

A thread of the search graph is a run: a new one takes its settings from the context that it is
started with, named as in a config, and makes its folder in `runs`; another takes those of its
folder. See `tap_agent.runs.checkpoints` for what a fork means. A thread of the refinement graph is a
conversation about a proxy of a run that has ended, which the run keeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.constants import CONFIG_KEY_CHECKPOINTER
from langgraph_sdk.runtime import ServerRuntime
from pydantic import BaseModel, ConfigDict, ValidationError

from agents.account import LimitMistake
from graphs.refinement import Refinement, Run
from graphs.search import Search, SearchSettings
from tap_agent.paths import RUNS, cache_folder
from tap_agent.runs import tracking
from tap_agent.runs.checkpoints import branches, conversations
from tap_agent.runs.folder import RunFolder, RunMistake, runs
from tap_agent.runs.result import Result
from tap_agent.sessions.conversation import make_refinement, pick, unlimited
from tap_agent.sessions.resources import Resources
from tap_agent.sessions.search import SearchSession
from tap_agent.settings.model import Settings
from tap_agent.settings.read import ConfigMistake
from tap_agent.studio.saver import RunSaver, lend_waiting
from tap_agent.studio.writer import RunWriter, ThreadMistake, begin, go_on
from tap_eval.mistake import DamagedMistake, Mistake

_SAVER = RunSaver(RUNS)


class Refusal(RuntimeError):
    """A mistake's sentence; of most exceptions that are no `RuntimeError` the server shows the name alone."""


@contextmanager
def _refusing(running: bool) -> Iterator[None]:
    """Passes a user's mistake on to the server: of a run, or of a change of state."""
    try:
        yield
    except Mistake as mistake:
        if running:
            raise Refusal(str(mistake)) from mistake
        from starlette.exceptions import HTTPException  # the server's own

        raise HTTPException(409, str(mistake)) from mistake


@asynccontextmanager
async def checkpointer() -> AsyncIterator[RunSaver]:
    """The saver of all threads; what it opens, it closes after each access."""
    yield _SAVER


@asynccontextmanager
async def search(config: RunnableConfig, runtime: ServerRuntime[Any]) -> AsyncIterator[Any]:
    """The search graph, for one access of the server; blocking work is done in threads.

    A user's mistake ends a run as `Refusal`, and answers a change of state with status 409.
    """
    if runtime.access_context in ("assistants.read", "threads.read"):
        yield _drawn()
        return
    execution = runtime.execution_runtime
    given = (execution.context if execution else None) or {}
    with _refusing(execution is not None):
        async with AsyncExitStack() as held:
            writer = await asyncio.to_thread(_open, config["configurable"], given, session=execution is not None)
            held.push_async_callback(asyncio.to_thread, writer.close)
            resources = Resources(writer.settings, cache_folder())
            held.push_async_callback(asyncio.to_thread, resources.__exit__)
            if execution:
                await asyncio.to_thread(_check, resources)
            session = SearchSession(writer.folder, resources, lambda event: None)
            held.push_async_callback(asyncio.to_thread, session.__exit__)
            await held.enter_async_context(_SAVER.writing(writer.thread, writer))
            if saver := config["configurable"].get(CONFIG_KEY_CHECKPOINTER):
                lend_waiting(saver)
            graph = session.machine.graph(Settings).compile(checkpointer=_SAVER)
            try:
                yield graph
            except LimitMistake as limit:
                snapshot = await graph.aget_state({"configurable": {"thread_id": writer.thread}})
                await asyncio.to_thread(session.stop, snapshot, limit)
                raise
            finally:
                if session.result:
                    await asyncio.to_thread(_track, writer, session.result)


def _open(configurable: dict[str, Any], given: dict[str, Any], *, session: bool) -> RunWriter:
    thread, checkpoint = str(configurable["thread_id"]), cast("str | None", configurable.get("checkpoint_id"))
    if known := branches(RUNS, thread):
        return go_on(known, thread, checkpoint, given, session=session)
    if not session:
        raise ThreadMistake(f"thread {thread} has no state yet: start a run in it.")
    return begin(RUNS, thread, given)


class About(BaseModel):
    """What a conversation is about: by default the best proxy of the latest run that has ended."""

    model_config = ConfigDict(extra="forbid")
    run: str | None = None
    """a folder in `runs`; of a conversation that has begun, its own"""
    proxy: str | None = None
    llm: str | None = None
    """in place of the run's"""


class _Spoken:
    """Where the checkpoints of a conversation go: to its run, whatever is written."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def admit(self, source: str) -> None:
        """Nothing is refused."""

    def database(self) -> Path:
        return self._folder.conversations


@asynccontextmanager
async def refinement(config: RunnableConfig, runtime: ServerRuntime[Any]) -> AsyncIterator[Any]:
    """The refinement graph, for one access of the server: a thread is a conversation of a run. See `search`."""
    if runtime.access_context in ("assistants.read", "threads.read"):
        yield _drawn_conversation()
        return
    execution = runtime.execution_runtime
    thread = str(config["configurable"]["thread_id"])
    with _refusing(execution is not None):
        async with AsyncExitStack() as held:
            given = (execution.context if execution else None) or {}
            folder, proxy, settings = await asyncio.to_thread(_about, thread, given)
            resources = Resources(settings, cache_folder())
            held.push_async_callback(asyncio.to_thread, resources.__exit__)
            if execution:
                await asyncio.to_thread(resources.open)
            account = await asyncio.to_thread(resources.account, folder.calls)
            held.push_async_callback(asyncio.to_thread, account.__exit__)
            conversing = folder.conversing(thread)
            await asyncio.to_thread(conversing.__enter__)
            held.push_async_callback(asyncio.to_thread, conversing.__exit__, None, None, None)
            await held.enter_async_context(_SAVER.writing(thread, _Spoken(folder)))
            if saver := config["configurable"].get(CONFIG_KEY_CHECKPOINTER):
                lend_waiting(saver)
            yield make_refinement(folder, proxy, resources, account).graph(About).compile(checkpointer=_SAVER)


def _about(thread: str, given: Any) -> tuple[RunFolder, str, Settings]:
    """The run, the proxy and the settings of a conversation; raises a `Mistake`."""
    try:
        about = given if isinstance(given, About) else About.model_validate(given)
    except ValidationError as error:
        raise ConfigMistake(
            f"{given!r} is not what a conversation is about: give {', '.join(About.model_fields)}, each as text."
        ) from error
    ended = [run for run in runs(RUNS) if _has_result(run, run.name == about.run)]
    known = [run for run in ended if thread in conversations(run)]
    named = known or [run for run in ended if about.run in (None, run.name)]
    if not named:
        raise RunMistake(f"no run {about.run or ''} in {RUNS} has ended: there is no proxy to talk about.")
    result = named[0].finished()
    settings = named[0].settings({"llm": about.llm})
    return named[0], pick(result, about.proxy or result.best).name, unlimited(settings)


def _has_result(run: RunFolder, asked: bool) -> bool:
    """Whether a run has come to something; raises `DamagedMistake` of one that is `asked` for."""
    try:
        return run.result() is not None
    except DamagedMistake:
        if asked:
            raise
        return False


@cache
def _drawn_conversation() -> Any:
    """The graph to look at: none of its nodes can run."""

    def closed(*_: object) -> Any:
        raise RuntimeError("this graph is only to be looked at")

    return Refinement(closed, closed, closed, Run("", closed, closed)).graph(About).compile()


def _check(resources: Resources) -> None:
    tracking.check(resources.settings.track)
    resources.check()


def _track(writer: RunWriter, result: Result) -> None:
    with tracking.Tracker(writer.folder(), writer.settings) as tracker:
        tracker.conclude(result)


@cache
def _drawn() -> Any:
    """The graph to look at: none of its nodes can run."""

    def closed(*_: object) -> Any:
        raise RuntimeError("this graph is only to be looked at")

    return Search(closed, SearchSettings(), closed, closed, closed).graph(Settings).compile()
