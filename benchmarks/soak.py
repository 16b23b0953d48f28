"""A search of thousands of candidates: what it keeps, what it holds, and what it takes beside the work itself.

    PYTHONPATH=. python -m benchmarks.soak --candidates 2000

The search of a run, with checkpoints, events and account, of the digits network. It is judged by measured allocations,
so that no candidate is measured, and sentences of the embedded model's grammars are drawn at random in its place.

A row each time that the number of candidates has doubled, and at the end: KiB a candidate of checkpoints.sqlite, of
calls.sqlite and of events.jsonl; MiB of memory that are the process's own; and ms of its time a candidate since
the row before, without allocating bits and drawing sentences. The sandbox is another process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.controllers import Drawing, DrawingChat
from tap_agent.runs.folder import RunFolder
from tap_agent.sessions import benchmark
from tap_agent.sessions.resources import Resources
from tap_agent.sessions.search import search
from tap_agent.settings.model import Settings
from tap_agent.settings.read import read_settings
from tap_agent.terminal.bar import Bar
from tap_eval.allocation.allocator import allocate
from tools import evaluation

_POPULATION = 8
_ALLOCATIONS = 16


class Drawn(Resources):
    """With sentences that are drawn in place of a language model."""

    models = Drawing()  # type: ignore[assignment]


class Timed:
    """A function, and the seconds of its threads' time that it has taken."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.thread_time() - began


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=2000)
    parser.add_argument("--keep-checkpoints", choices=("last", "all"), default="last")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        given = folder / "given.parquet"
        settings = read_settings(
            None,
            {
                "population": _POPULATION,
                "generations": max(chosen.candidates // _POPULATION - 1, 0),
                "search": 100,
                "test": 100,
                "calibration_draws": 1,
                "baselines": "uniform",
                "keep_checkpoints": chosen.keep_checkpoints,
                "second_budget": False,
            },
        )
        build(settings, folder / "cache", given)
        settings = read_settings(None, {**settings.model_dump(mode="json"), "worth": f"benchmark:{given}"})
        soak(RunFolder.create(folder / "run", settings), settings, folder / "cache")


def build(settings: Settings, cache: Path, path: Path) -> None:
    """Measures some allocations, by which candidates are then judged."""
    with Resources(settings, cache) as resources, Bar() as bar:
        benchmark.build(resources, path, 2, 4, 2, _ALLOCATIONS, bar)


def soak(folder: RunFolder, settings: Settings, cache: Path) -> None:
    """Searches, and prints a row now and then."""
    beside = Timed(allocate), Timed(DrawingChat._generate)
    evaluation.allocate = beside[0]
    DrawingChat._generate = lambda *args, **kwargs: beside[1](*args, **kwargs)  # type: ignore[method-assign]
    names = ("checkpoints.sqlite", "calls.sqlite", "events.jsonl")
    print(f"| candidates | {' | '.join(f'KiB of {name}' for name in names)} | MiB | ms |\n|{'---|' * (len(names) + 3)}")
    total = settings.proposals
    done, last, since = 0, 0, time.process_time()

    def own() -> float:
        """Seconds of this process, without what is timed beside."""
        return time.process_time() - sum(each.seconds for each in beside)

    def listen(event: dict[str, Any]) -> None:
        nonlocal done, last, since
        done += event["event"] == "proposed"
        if event["event"] != "generation" or done < min(2 * last, total):
            return
        sizes = [_size(folder.path, name) / 1024 / done for name in names]
        spent = 1000 * (own() - since) / (done - last)
        cells = [f"{done:,}", *(f"{size:.1f}" for size in sizes), f"{_memory():.0f}", f"{spent:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        last, since = done, own()

    with Drawn(settings, cache) as resources:
        search(folder, resources, listen)


def _size(folder: Path, name: str) -> int:
    """Bytes of a file, with what SQLite keeps beside it."""
    return sum(path.stat().st_size for path in folder.glob(f"{name}*"))


def _memory() -> float:
    status = Path("/proc/self/status").read_text()
    (kib,) = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(kib) / 1024


if __name__ == "__main__":
    main()
