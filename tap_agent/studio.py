"""What langgraph.json names: the graphs as the server behind LangGraph Studio opens them, and their checkpoints.

A thread of the search graph is a run: a new one takes its settings from the context that it is
started with, named as in a config, and makes its folder in `runs`; another takes those of its
folder. See `tap_agent.lines` for what a fork means.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.constants import CONFIG_KEY_CHECKPOINTER
from langgraph_sdk.runtime import ServerRuntime

from agents.account import LimitMistake
from graphs.search import Search, SearchSettings
from tap_agent import RUNS, track
from tap_agent.lines import ThreadMistake, Writing, begin, go_on, lines
from tap_agent.result import Result
from tap_agent.saver import RunSaver, lend_waiting
from tap_agent.session import Session
from tap_agent.settings import Settings
from tap_agent.workshop import Workshop, cache_folder
from tap_eval.mistake import Mistake

_SAVER = RunSaver(RUNS)


class Refusal(RuntimeError):
    """A mistake's sentence; of most exceptions that are no `RuntimeError` the server shows the name alone."""


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
    try:
        async with AsyncExitStack() as held:
            writing = await asyncio.to_thread(_open, config["configurable"], given, session=execution is not None)
            held.push_async_callback(asyncio.to_thread, writing.close)
            workshop = Workshop(writing.settings, cache_folder())
            held.push_async_callback(asyncio.to_thread, workshop.__exit__)
            if execution:
                await asyncio.to_thread(_check, workshop)
            session = Session(writing.folder, workshop, lambda event: None)
            held.push_async_callback(asyncio.to_thread, session.__exit__)
            await held.enter_async_context(_SAVER.writing(writing.thread, writing))
            if saver := config["configurable"].get(CONFIG_KEY_CHECKPOINTER):
                lend_waiting(saver)
            graph = session.machine.graph(Settings).compile(checkpointer=_SAVER)
            try:
                yield graph
            except LimitMistake as limit:
                snapshot = await graph.aget_state({"configurable": {"thread_id": writing.thread}})
                await asyncio.to_thread(session.stop, snapshot, limit)
                raise
            finally:
                if session.result:
                    await asyncio.to_thread(_track, writing, session.result)
    except Mistake as mistake:
        if execution:
            raise Refusal(str(mistake)) from mistake
        from starlette.exceptions import HTTPException  # the server's own

        raise HTTPException(409, str(mistake)) from mistake


def _open(configurable: dict[str, Any], given: dict[str, Any], *, session: bool) -> Writing:
    thread, checkpoint = str(configurable["thread_id"]), cast("str | None", configurable.get("checkpoint_id"))
    if known := lines(RUNS, thread):
        return go_on(known, thread, checkpoint, given, session=session)
    if not session:
        raise ThreadMistake(f"thread {thread} has no state yet: start a run in it.")
    return begin(RUNS, thread, given)


def _check(workshop: Workshop) -> None:
    track.check(workshop.settings.track)
    workshop.check()


def _track(writing: Writing, result: Result) -> None:
    with track.Tracker(writing.folder(), writing.settings) as tracker:
        tracker.conclude(result)


@cache
def _drawn() -> Any:
    """The graph to look at: none of its nodes can run."""

    def closed(*_: object) -> Any:
        raise RuntimeError("this graph is only to be looked at")

    return Search(closed, SearchSettings(), closed, closed, closed).graph(Settings).compile()
