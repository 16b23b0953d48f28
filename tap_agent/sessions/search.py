"""One session of a search: the graph over its checkpoints, from the start or from where it stopped."""

from __future__ import annotations

import gc
import threading
import time
import uuid
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any, Literal, cast

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.utils import get_function_nonlocals
from langgraph.types import StateSnapshot

from agents.account import Account, LimitMistake
from agents.proposer import Proposer
from graphs.search import Search
from graphs.state import Bits, SearchState
from tap_agent.runs.checkpoints import opened, tip_of
from tap_agent.runs.folder import RunFolder, RunMistake
from tap_agent.runs.result import Result
from tap_agent.sessions.outcome import conclude_run, network_record
from tap_agent.sessions.resources import Resources
from tap_agent.settings.fields import of_a_session
from tap_agent.settings.model import Settings
from tap_eval.benchmark.benchmark import read
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BenchmarkMistake
from tap_eval.sealed import digest

Listener = Callable[[dict[str, Any]], None]
_MOST_STEPS = 10_000  # far beyond any search; the graph's own default is 25


def search(folder: RunFolder, resources: Resources, listen: Listener, brief: bool = False) -> Result:
    """Runs or continues the search of `folder` to its end; `listen` is given every event; see `conclude_run`.

    Whatever is raised leaves the checkpoints as they are, and the next call continues there.

    A limit of calls, cost or time ends the search early, with a result all the same: what was
    paid for is worth knowing, so the proposals of the unfinished generation are judged too, and
    the best so far gets its table and report, which say that they were `stopped`. The
    checkpoints stay at the unfinished generation, from where a later call with a higher limit
    goes on. Only where nothing lives yet is `LimitMistake` raised.
    """
    if (ended := folder.result()) and ended.stopped is None:  # by another process, while this one opened its parts
        return ended
    settings = resources.settings
    with (
        _garbage_collected_early(),
        SearchSession(lambda: folder, resources, listen, brief) as session,
        opened(folder.checkpoints, settings.keep_checkpoints) as checkpointer,
    ):
        compiled = session.machine.graph().compile(checkpointer=checkpointer)
        known, before_it = tip_of(folder), folder.events()
        begun = (event["thread"] for event in before_it if "thread" in event)
        thread = known.thread if known else next(begun, str(uuid.uuid4()))
        config: RunnableConfig = {
            "configurable": {"thread_id": thread},
            "recursion_limit": _MOST_STEPS,
            "max_concurrency": settings.population,
        }
        before = compiled.get_state(config).values if known else {}
        if "weights" in before and not {"finalists", "notebook"} <= before.keys():
            raise RunMistake(
                f"{folder.path} was begun by an earlier version, whose steps this one cannot go on with: begin anew by "
                f"`tap-agent run --config {folder.path / 'config.yaml'}`."
            )
        session.emit(first_event("resumed" if known else "started", thread, settings, before_it))
        try:
            compiled.invoke(None if known else {}, config, durability="sync")
        except LimitMistake as limit:
            session.stop(compiled.get_state(config), limit)
        if session.result is None:  # a fork of a final state
            session.machine.report(cast("SearchState", compiled.get_state(config).values))
    assert session.result is not None
    return session.result


@contextmanager
def _garbage_collected_early() -> Iterator[None]:
    """Has Python look for circles that nobody holds among what is made in here alone.

    It looks at everything only once there is a quarter more than there was: beside the half million objects of
    libraries and networks, what the steps of a hundred generations leave.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        get_function_nonlocals.cache_clear()  # its keys are nodes of graphs, which hold all networks of a search


def first_event(
    kind: Literal["started", "resumed"], thread: str, settings: Settings, before: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The event with which each session of a run begins, `before` which were those of earlier ones.

    Raises `RunMistake` where the run began with other settings, but for those of `of_a_session`, and
    `BenchmarkMistake` where it judged by other measured allocations than are in the file now.
    """
    own = settings.model_dump(mode="json")
    began: dict[str, Any] = next((each["settings"] for each in before if "settings" in each), {})
    for name in began.keys() & own.keys() - of_a_session():
        if began[name] != own[name]:
            raise RunMistake(
                f"the run began with {name} = {began[name]!r}, and its config.yaml has {own[name]!r}: put that back, "
                "or begin anew with `tap-agent run`."
            )
    event = {"event": kind, "thread": thread, "llm": settings.llm, "seed": settings.seed, "settings": own}
    if settings.given is None:
        return event
    given = read(settings.given).about.rows
    if any(each.get("given", given) != given for each in before):
        raise BenchmarkMistake(
            f"{settings.given} holds other allocations than when the run began: put that file back, or begin anew."
        )
    return {**event, "given": given}


def check_same(before: Sequence[Mapping[str, Any]], benches: Sequence[Bench]) -> None:
    """Raises `RunMistake` where a network or its images are others than events of `before` tell."""
    contents: dict[str, dict[str, str]] = {}
    for each in before:
        if "content" in each:  # what it began with counts, where a network was prepared again
            contents[each["network"]] = each["content"] | contents.get(each["network"], {})
    for bench in benches:
        own = content_of(bench)
        for what, was in contents.get(bench.name, {}).items():
            if (now := own.get(what, "none")) != was:
                raise RunMistake(
                    f"{bench.name} has other {what} than when the run began ({now[:8]}, and not {was[:8]}): put "
                    "those back, or begin anew with `tap-agent run`."
                )


def content_of(bench: Bench) -> dict[str, str]:
    """Names what a network is measured with, the same on every machine; runs of before know of fewer of these."""
    splits = bench.splits
    further = " ".join(draw.digest for draw in splits.calibrations[1:])
    return {
        "weights": bench.weights_digest,
        "calibration images": splits.calibrations[0].digest,
        "further calibration images": digest(further.encode()),
        "search images": splits.search.digest,
        "test images": splits.test.digest,
    } | ({"latencies": bench.task.latencies.content} if bench.task.latencies else {})


class SearchSession(AbstractContextManager["SearchSession"]):
    """One session of the run in the folder that `folder` gives, which is asked for when there is something to write."""

    def __init__(
        self, folder: Callable[[], RunFolder], resources: Resources, listen: Listener, brief: bool = False
    ) -> None:
        self._folder = folder
        self._resources = resources
        self._listen = listen
        self._brief = brief
        resources.watch = lambda what, done, of: listen({"event": "working", "what": what, "done": done, "of": of})
        self._held = ExitStack()
        self._opening = threading.Lock()
        self._opened: Account | None = None
        self._began = time.monotonic()
        self._recorded: tuple[int, dict[str, list[Bits]]] = 0, {}
        """the size of the events when they were read, and the allocations that they told of"""
        self.result: Result | None = None
        """what the session has come to"""
        self.machine = Search(
            self._proposer,
            resources.search_settings(),
            self.emit,
            self._conclude,
            self._recall,
        )

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def emit(self, event: dict[str, Any]) -> None:
        """Records an event and passes it on."""
        if event["event"] == "prepared":
            (bench,) = (each for each in self._resources.benchmark if each.name == event["network"])
            event = {
                **event,
                "record": network_record(bench, bench not in self._resources.benches).model_dump(mode="json"),
                "content": content_of(bench),
            }
        event = {**event, "measured": self._resources.ledger.measured, "elapsed": round(self._seconds(), 3)}
        self._folder().record(event)
        self._listen(event)

    def stop(self, snapshot: StateSnapshot, limit: LimitMistake) -> None:
        """Concludes a search that `limit` has stopped there; raises it again when nothing lives yet."""
        results = [task.result["candidates"] for task in snapshot.tasks if task.result]
        state = self.machine.so_far(cast("SearchState", snapshot.values), dict(ChainMap(*results)))
        if state["best"] is None:
            raise limit
        state = cast("SearchState", {**state, **self.machine.choose(state)})
        self._conclude(self.machine.whole(state), str(limit))

    def _conclude(self, state: SearchState, stopped: str | None = None) -> None:
        check_same(self._folder().events(), self._resources.benchmark)
        self.result = conclude_run(
            self._folder(), self._resources, state, self.emit, self._account(), stopped, self._brief
        )

    @cached_property
    def _before(self) -> float:
        """Seconds that the run took before this session."""
        return self._folder().seconds()

    def _seconds(self) -> float:
        """That the run has taken, by a clock that nobody sets."""
        return self._before + time.monotonic() - self._began

    def _proposer(self) -> Proposer:
        check_same(self._folder().events(), self._resources.benchmark)
        return self._resources.proposer(self._account())

    def _recall(self, name: str) -> list[Bits] | None:
        """The allocations of a candidate, where its proposal is on record."""
        size = self._folder().log_of_events.stat().st_size
        if name not in self._recorded[1] and self._recorded[0] != size:
            self._recorded = size, self._folder().allocations()
        return self._recorded[1].get(name)

    def _account(self) -> Account:
        with self._opening:
            if self._opened is None:
                self._opened = self._held.enter_context(self._resources.account(self._folder().calls, self._seconds))
            return self._opened
