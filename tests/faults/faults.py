"""What befalls a run, its cache, and the server of its language model."""

from __future__ import annotations

import io
import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tap_agent.runs.folder import RunFolder
from tap_eval.sealed import sealed, unsealed
from tests.agents.scripted import Answer, ChatServer
from tests.faults import damage
from tests.graphs.test_search import script

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """A run in a folder, its cache, and the server of its language model."""

    run: Path
    cache: Path
    server: ChatServer


Fault = Callable[[Place], AbstractContextManager[object]]
"""what befalls a place; it lasts as long as the context"""


def file(name: str, how: Callable[[Path], None]) -> Fault:
    """A file of the run."""

    def befall(place: Place) -> AbstractContextManager[object]:
        how(place.run / name)
        return nullcontext()

    return befall


def cached(pattern: str, how: Callable[[Path], None]) -> Fault:
    """All files of the cache like `pattern`."""

    def befall(place: Place) -> AbstractContextManager[object]:
        found = [path for path in place.cache.rglob(pattern) if path.is_file()]
        assert found
        for path in found:
            how(path)
        return nullcontext()

    return befall


@contextmanager
def full(_: Place | None = None) -> Iterator[None]:
    """No file can get longer, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def every_file_cut(place: Place) -> AbstractContextManager[object]:
    """Measurements, rounded weights and trained network are cut."""
    for pattern in ("measurements.sqlite", "*.safetensors"):
        cached(pattern, damage.cut)(place)
    return nullcontext()


def forgotten(of: Fault) -> Fault:
    """The same, when nothing has been measured yet."""

    def befall(place: Place) -> AbstractContextManager[object]:
        with closing(sqlite3.connect(place.cache / "measurements.sqlite")) as database, database:
            database.execute("DELETE FROM ledger")
        return of(place)

    return befall


def read_only(which: Callable[[Place], Path]) -> Fault:
    """A folder whose files others may read, and nobody write."""

    @contextmanager
    def befall(place: Place) -> Iterator[None]:
        folder = which(place)
        modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
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
def written_elsewhere(place: Place) -> Iterator[None]:
    """Another process writes the run."""
    with RunFolder(place.run).held():
        yield


def nothing(_: Place) -> AbstractContextManager[object]:
    """Nothing but what the program is sent."""
    return nullcontext()


def down(place: Place) -> AbstractContextManager[object]:
    """The server of the language model is not there."""
    return place.server.down()


@contextmanager
def refusing(place: Place) -> Iterator[None]:
    """The server lists its models for nobody with this key."""
    place.server.refuses = True
    yield
    place.server.refuses = False


def answered(*answers: Answer, then: Callable[[dict[str, Any]], Answer] = script) -> Fault:
    """The server gives those answers first, whatever it is asked, and then what it should."""

    @contextmanager
    def befall(place: Place) -> Iterator[None]:
        left = [*answers]
        before, place.server.script = place.server.script, lambda asked: left.pop(0) if left else then(asked)
        yield
        place.server.script = before

    return befall


@contextmanager
def down_midway(place: Place) -> Iterator[None]:
    """The server goes down with a request at hand."""
    with ExitStack() as held:

        def breaks(request: dict[str, Any]) -> Answer:
            held.enter_context(place.server.down())
            return script(request)

        with answered(then=breaks)(place):
            yield


def impatient(of: Fault) -> Fault:
    """The same in a run whose calls take a second at most."""

    @contextmanager
    def befall(place: Place) -> Iterator[None]:
        config = place.run / "config.yaml"
        before = config.read_text()
        config.write_text(sealed(unsealed(before).replace("call_seconds: 180.0", "call_seconds: 1.0")))
        with of(place):
            yield
        config.write_text(before)

    return befall


@contextmanager
def dribbling(place: Place) -> Iterator[None]:
    """An answer comes letter by letter, and has no end."""
    place.server.dribbles = True
    yield
    place.server.dribbles = False


@contextmanager
def hanging(place: Place) -> Iterator[None]:
    """The server takes what it is asked, and says nothing."""
    place.server.answers.clear()
    yield
    place.server.answers.set()


def typed(words: str, of: Fault) -> Fault:
    """The same with lines that a person types."""

    @contextmanager
    def befall(place: Place) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch, of(place):
            patch.setattr("sys.stdin", io.StringIO(words))
            yield

    return befall


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
