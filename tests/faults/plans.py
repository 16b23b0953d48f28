"""What may go wrong with a run, what its user then sees, and what is kept: plans with which the program is driven."""

from __future__ import annotations

import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder
from tests.faults import damage

ROOT = Path(__file__).parents[2]
RUN = "run"
"""the folder that commands name"""
SETTINGS = [
    "--population", "3", "--generations", "1", "--search", "100", "--test", "100", "--draws", "1",
    "--baselines", "uniform", "--no-second-budget", "--no-finish",
]  # fmt: skip
Fault = Callable[[Path, Path], AbstractContextManager[object]]
"""what befalls a run in a folder, and the cache; it lasts as long as the context"""


@dataclass(frozen=True)
class Plan:
    """One thing that goes wrong, with a run that was broken off within its last generation, unless it had `ended`."""

    kind: str
    what: str
    fault: Fault
    command: str
    exit: Exit
    sees: str
    """part of what is said; where nothing is to be said, \"\" """
    kept: str
    ended: bool = False
    then: str | None = None
    """the command after which, the fault being over, the run is as if nothing had happened; "" where it is at once"""

    @property
    def name(self) -> str:
        """Of the plan among the tests."""
        return f"{self.what}: {self.command}"


def file(name: str, how: Callable[[Path], None]) -> Fault:
    """A file of the run."""

    def befall(run: Path, cache: Path) -> AbstractContextManager[object]:
        how(run / name)
        return nullcontext()

    return befall


def cached(pattern: str, how: Callable[[Path], None]) -> Fault:
    """All files of the cache like `pattern`."""

    def befall(run: Path, cache: Path) -> AbstractContextManager[object]:
        found = [path for path in cache.rglob(pattern) if path.is_file()]
        assert found
        for path in found:
            how(path)
        return nullcontext()

    return befall


@contextmanager
def full(run: Path, cache: Path) -> Iterator[None]:
    """No file can get longer, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def every_file_cut(run: Path, cache: Path) -> AbstractContextManager[object]:
    """Measurements, rounded weights and trained network are cut."""
    for pattern in ("measurements.sqlite", "*.safetensors"):
        cached(pattern, damage.cut)(run, cache)
    return nullcontext()


def forgotten(of: Fault) -> Fault:
    """The same, when nothing has been measured yet."""

    def befall(run: Path, cache: Path) -> AbstractContextManager[object]:
        with closing(sqlite3.connect(cache / "measurements.sqlite")) as database, database:
            database.execute("DELETE FROM ledger")
        return of(run, cache)

    return befall


def read_only(which: Callable[[Path, Path], Path]) -> Fault:
    """A folder whose files others may read, and nobody write."""

    @contextmanager
    def befall(run: Path, cache: Path) -> Iterator[None]:
        place = which(run, cache)
        modes = {path: path.stat().st_mode for path in (place, *place.rglob("*"))}
        try:
            for path in modes:
                path.chmod(0o555 if path.is_dir() else 0o444)
            with nobody():
                yield
        finally:
            for path, mode in modes.items():
                path.chmod(mode)

    return befall


@contextmanager
def written_elsewhere(run: Path, cache: Path) -> Iterator[None]:
    """Another process writes the run."""
    with RunFolder(run).held():
        yield


@contextmanager
def nobody() -> Iterator[None]:
    """As a user without rights, which root is not; skips the test where that user cannot read the program."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        for place in (ROOT / "tap_agent" / "__main__.py", Path(pytest.__file__)):
            if not os.access(place, os.R_OK, effective_ids=True):
                pytest.skip(f"root does without its rights here, and then may not read {place}")
        yield
    finally:
        os.seteuid(0)


RESUME = "resume run"
APPLY = "apply uniform:3 --search 100 --test 100 --draws 1 --baselines uniform"
AGAIN = "all; the rest of the search gives what it would have given"
WHOLE = "the run, as it was"
ASIDE = "the damaged file too, beside it as FILE.damaged"
PLANS = [
    # files of a run
    Plan("files", "config.yaml is cut at the end of a line", file("config.yaml", damage.cut_at_line), RESUME, Exit.OK,
         "config.yaml is not what was written, and is config.yaml.damaged now: is written anew", ASIDE, then=""),
    Plan("files", "config.yaml is empty", file("config.yaml", damage.emptied), "apply run", Exit.DAMAGED,
         "config.yaml is empty: `tap-agent resume run` writes it anew", WHOLE, ended=True),
    Plan("files", "a bit of config.yaml is another", file("config.yaml", damage.flipped), "apply run", Exit.DAMAGED,
         "config.yaml is not what was written: `tap-agent resume run` writes it anew", WHOLE, ended=True),
    Plan("files", "config.yaml is of a newer version", file("config.yaml", damage.newer), RESUME, Exit.DAMAGED,
         "config.yaml was written by a newer version of tap-agent (form 9, and this one knows 1): update", WHOLE),
    Plan("files", "result.json is cut at the end of a line", file("result.json", damage.cut_at_line), "report run",
         Exit.DAMAGED, "result.json is not what was written: `tap-agent resume run` writes it anew", WHOLE, ended=True),
    Plan("files", "result.json is cut", file("result.json", damage.cut), "chat run", Exit.DAMAGED,
         "result.json is not what was written: `tap-agent resume run` writes it anew", WHOLE, ended=True),
    Plan("files", "result.json is empty", file("result.json", damage.emptied), "report run", Exit.DAMAGED,
         "result.json is empty: `tap-agent resume run` writes it anew", WHOLE, ended=True),
    Plan("files", "a bit of result.json is another", file("result.json", damage.flipped), RESUME, Exit.OK,
         "result.json is not what was written, and is result.json.damaged now: it is written anew", ASIDE, ended=True,
         then=""),
    Plan("files", "result.json is of a newer version", file("result.json", damage.newer), "report run", Exit.DAMAGED,
         "result.json was written by a newer version of tap-agent", WHOLE, ended=True),
    Plan("files", "all lines of events.jsonl but the first are lost", file("events.jsonl", damage.tail_lost), RESUME,
         Exit.OK, "", AGAIN, then=""),
    Plan("files", "a bit of events.jsonl is another", file("events.jsonl", damage.flipped), RESUME, Exit.OK,
         "run/events.jsonl has lines that are not what was written, and are left out: 1", AGAIN, then=""),
    Plan("files", "a bit of the last step is another", file("checkpoints.sqlite", damage.step_flipped), RESUME, Exit.OK,
         "its steps are done again from what was answered and measured", ASIDE, then=""),
    Plan("files", "checkpoints.sqlite is empty", file("checkpoints.sqlite", damage.emptied), RESUME, Exit.OK,
         "checkpoints.sqlite holds no step: its steps are done again", AGAIN, then=""),
    Plan("files", "checkpoints.sqlite is of a newer version", file("checkpoints.sqlite", damage.newer), RESUME,
         Exit.DAMAGED, "checkpoints.sqlite was written by a newer version of tap-agent", WHOLE),
    Plan("files", "calls.sqlite is cut", file("calls.sqlite", damage.cut), RESUME, Exit.DAMAGED,
         "calls.sqlite is not what was written", WHOLE),
    Plan("files", "calls.sqlite is empty", file("calls.sqlite", damage.emptied), RESUME, Exit.DAMAGED,
         "calls.sqlite is empty: put it back from a copy, or move it away", WHOLE),
    # caches
    Plan("caches", "every file of the cache is cut", every_file_cut, RESUME, Exit.OK,
         "it is measurements.sqlite.damaged now, and all is measured anew", "all; the cache is made anew", then=""),
    Plan("caches", "the measurements are of a newer version", cached("measurements.sqlite", damage.newer), RESUME,
         Exit.DAMAGED, "measurements.sqlite was written by a newer version of tap-agent", WHOLE),
    # disks
    Plan("disks", "the disk is full when a run begins", full, "run --out new", Exit.STORAGE,
         "cannot be written (File too large): make room there, or point TMPDIR at", "nothing is left of it"),
    Plan("disks", "the disk is full while a run goes on", full, RESUME, Exit.STORAGE, "cannot be written", AGAIN,
         then=RESUME),
    Plan("disks", "the disk of the cache is full", forgotten(full), APPLY, Exit.STORAGE,
         "make room, or point TAP_CACHE at a folder that takes files", "what was measured before"),
    Plan("disks", "the run's folder is read-only", read_only(lambda run, cache: run), RESUME, Exit.RUN,
         "cannot be written", WHOLE),
    Plan("disks", "the cache is read-only", forgotten(read_only(lambda run, cache: cache)), APPLY, Exit.STORAGE,
         "make room, or point TAP_CACHE at a folder that takes files", "what was measured before"),
    # clocks
    Plan("clocks", "the clock was put back by a century within a run", file("events.jsonl", damage.of_another_day),
         "resume run --max-minutes 60", Exit.OK, "", AGAIN, then=""),
    # processes
    Plan("processes", "another process writes the run", written_elsewhere, RESUME, Exit.RUN,
         "run is being written by another process: wait for it, or stop it", WHOLE),
]  # fmt: skip
