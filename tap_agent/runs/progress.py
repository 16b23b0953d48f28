"""How far a run has come, for whoever looks at it from outside: its result, or what its events tell so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from graphs import population
from graphs.state import Candidate, Generation, by_proposal
from tap_agent.runs.folder import RunFolder, read_result
from tap_agent.runs.result import History, NetworkRecord, Result

State = Literal["starting", "running", "stopping", "interrupted", "stopped", "finished", "unreadable"]
"""`stopped` is by a limit, with a result; `interrupted` is without one"""


@dataclass(frozen=True)
class Overview:
    """One run in a line."""

    name: str
    state: State
    networks: str = ""
    budget: str = ""
    done: int = 0
    """generations, the initial one included"""
    of: int = 0
    fitness: float | None = None
    """of the best so far"""
    tests: tuple[float, ...] = ()
    """test top-1 of each network, in [0, 1]"""
    note: str = ""
    """why it cannot be read"""


def overview(folder: RunFolder, held: bool | None = None) -> Overview:
    """A run in a line; `held` is whether a process writes it, where that is known."""
    try:
        ended = None
        if folder.outcome.exists():
            ended = _ended(folder.path, folder.outcome.stat().st_mtime_ns)
            if ended.state == "finished":
                return ended
        if folder.is_held() if held is None else held:
            return _overview(folder, "running", read(folder, live=True))
        return ended or _overview(folder, "interrupted", read(folder))
    except Exception as error:  # noqa: BLE001 whatever is in one folder, the others are shown
        return Overview(folder.name, "unreadable", note=" ".join(str(error).split()))


@lru_cache(4096)
def _ended(path: Path, changed: int) -> Overview:
    result = _finished(path, changed)
    return _overview(RunFolder(path), "stopped" if result.stopped else "finished", result)


def _overview(folder: RunFolder, state: State, history: History) -> Overview:
    settings = folder.settings()
    return Overview(
        folder.name,
        state,
        ", ".join(network.network for network in settings.networks),
        ", ".join(dict.fromkeys(network.budget or settings.budget for network in settings.networks)),
        len(history.generations),
        settings.generations + 1,
        history.candidate(history.best).fitness if history.best else None,
        tuple(row.test.top1 for row in history.table if row.kind == "proxy"),
    )


def read(folder: RunFolder, live: bool = False) -> History:
    """The result of a run that has ended, else what its events tell; of a `live` one, those in any case."""
    events = folder.log_of_events
    if folder.outcome.exists() and not live:
        return _finished(folder.path, folder.outcome.stat().st_mtime_ns)
    return _so_far(folder.path, events.stat().st_size if events.exists() else 0)


@lru_cache(8)
def _finished(path: Path, changed: int) -> Result:
    folder = RunFolder(path)
    return read_result(folder.outcome, folder.mends)


@lru_cache(8)
def _so_far(path: Path, size: int) -> History:
    return of_events(RunFolder(path).events())


def of_events(events: Sequence[dict[str, Any]]) -> History:
    """What the events of a run tell; what happened again after a crash counts as it was the last time.

    Networks are there once they are prepared; a candidate has no fitness before it is judged.
    """
    networks: dict[str, NetworkRecord] = {}
    candidates: dict[str, dict[str, Any]] = {}
    generations: dict[int, Generation] = {}
    refinements: dict[str, Candidate] = {}
    notebook: list[str] = []
    for event in events:
        match event["event"]:
            case "prepared" if "record" in event:  # events of earlier versions lack it
                networks[event["network"]] = NetworkRecord.model_validate(event["record"])
            case "proposed":
                candidates[event["name"]] = event
            case "judged" if event["name"] in candidates:
                candidates[event["name"]] = candidates[event["name"]] | event
            case "refined":
                refinements[event["name"]] = Candidate.model_validate(event)
            case "generation":
                generations[event["index"]] = Generation.model_validate(event)
            case "reflected":
                notebook = event["lines"]
            case _:
                pass
    found = [Candidate.model_validate(candidates[name]) for name in sorted(candidates, key=by_proposal)]
    return History(
        networks=list(networks.values()),
        generations=[generations[index] for index in sorted(generations)],
        candidates=found,
        refinements=list(refinements.values()),
        best=population.best(found),
        notebook=notebook,
    )
