"""A run's folder: its config, checkpoints, events, proxies, result and report.

Files are written whole or not at all, and sealed where they are read back (see `tap_eval.sealed`); a folder belongs to
one process at a time.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from graphs.state import Bits, Candidate
from tap_agent.paths import RUNS
from tap_agent.runs import events
from tap_agent.runs.files import put_sealed, write, write_sealed
from tap_agent.runs.result import Result
from tap_agent.settings.model import Settings
from tap_agent.settings.read import Given, dump, mapping, read_settings
from tap_eval import sealed
from tap_eval.mistake import Mistake
from tap_eval.proxies.proxy import Proxy
from tap_eval.scratch import scratch
from tap_eval.storage import readable, writing

NETWORKS = (".safetensors", ".onnx")
"""endings of files with a network in them"""
_BEFORE = {
    "rounding": "nearest",
    "sums": "float",
    "worth": "accuracy",
    "second_budget": False,
    "attention_activations": "off",
    "finish": False,
    "channel_groups": 1,
    "keep_checkpoints": "all",
}
"""what runs did before there were such settings, which are all in the configs of later ones"""
_OUT = "make room there, or give another --out"
_LONGEST_NAME = 60
"""letters of a network's name in that of a run's folder"""


class RunMistake(Mistake):
    """A run folder that is none, or that cannot be used for what was asked."""

    kind = "run"


class _Taken(RunMistake):
    """Something is where a run was to be."""


def _taken(path: Path) -> _Taken:
    go_on = f", or continue it with `tap-agent resume {path}`" if (path / "config.yaml").is_file() else ""
    return _Taken(f"{path} exists already: give another --out{go_on}.")


class RunFolder:
    """The files of one run under `path`."""

    def __init__(self, path: Path) -> None:
        """Raises `RunMistake` when `path` is no run folder."""
        if not (path / "config.yaml").is_file():
            raise RunMistake(f"{path} is no run folder: it has no config.yaml; `tap-agent list` shows the runs.")
        self.path = path
        self._writing = threading.Lock()

    @staticmethod
    def create(path: Path, settings: Settings) -> RunFolder:
        """A new folder at `path`; raises `RunMistake` when something is there already."""
        make_parent(path)
        with scratch(path.parent) as fresh:
            with writing(path, _OUT):
                put_sealed(fresh / "config.yaml", dump(settings))
            (fresh / "proxies").mkdir()
            try:
                path.mkdir()
            except FileExistsError as error:
                raise _taken(path) from error
            for entry in ("proxies", "config.yaml"):
                os.replace(fresh / entry, path / entry)
        return RunFolder(path)

    @staticmethod
    def unused(path: Path, settings: Settings) -> RunFolder:
        """A new folder at `path`, or beside it with a number where that is taken."""
        for end in itertools.chain([""], map("-{}".format, itertools.count(2))):
            place = path.with_name(f"{path.name}{end}")
            if not place.exists():
                with suppress(_Taken):  # by a run that began at the same moment
                    return RunFolder.create(place, settings)
        raise AssertionError("there is no last number")

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The settings with which it was started."""
        return self.path / "config.yaml"

    @property
    def outcome(self) -> Path:
        """The result, which is there once the run has ended."""
        return self.path / "result.json"

    @property
    def log_of_events(self) -> Path:
        """The events, a line each."""
        return self.path / "events.jsonl"

    @property
    def mends(self) -> str:
        """The next step where a file of it is damaged."""
        return f"`tap-agent resume {self.path}` writes it anew"

    @property
    def checkpoints(self) -> Path:
        """The SQLite database of the graph's checkpoints."""
        return self.path / "checkpoints.sqlite"

    @property
    def conversations(self) -> Path:
        """The SQLite database of the refinement graph's checkpoints, a thread a proxy."""
        return self.path / "conversations.sqlite"

    @property
    def calls(self) -> Path:
        """The SQLite database of the calls of language models."""
        return self.path / "calls.sqlite"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def models(self) -> list[Path]:
        """What it holds for others to run, and the bits in words: files that are its own, and no other."""
        found = [path for ending in NETWORKS for path in self.path.glob(f"model*{ending}")]
        return [path for path in (*sorted(found), self.best) if path.is_file() and not path.is_symlink()]

    @property
    def best(self) -> Path:
        """The best allocation."""
        return self.path / "best.json"

    @property
    def log(self) -> Path:
        """What the run printed, where it was started from the page."""
        return self.path / "log.txt"

    def settings(self, flags: Mapping[str, Any] = MappingProxyType({})) -> Settings:
        """The resolved config with which the run was started, with `flags` over it.

        Raises `ConfigMistake`, and `DamagedMistake` of a config that is not what was written.
        """
        return read_settings(self.given, flags)

    @property
    def given(self) -> Given:
        """What its config says, and what its version did where there was no such setting; raises as `settings`."""
        values = mapping(sealed.read(self.config, self.mends), self.config)
        if "worth" not in values and values.get("controller") == "ratio":
            values["controller"] = "paper"
        return Given(self.config, _BEFORE | values)

    @contextmanager
    def held(self, patience: float = 0.2) -> Iterator[None]:
        """Keeps other processes out; raises `RunMistake` when one stays in for longer than `patience` seconds.

        Another thread may end it.
        """
        busy = f"{self.path} is being written by another process: wait for it, or stop it."
        with _locked(self.path / ".lock", busy, patience):
            yield

    @contextmanager
    def conversing(self, thread: str) -> Iterator[None]:
        """Keeps others out of one of its conversations; raises `RunMistake` when somebody is answered there."""
        busy = f"the conversation is being answered elsewhere, in {self.path}: wait for that answer, or stop it."
        with _locked(self.path / f".lock-{thread}", busy):
            yield

    def is_held(self) -> bool:
        """Whether a process is writing here."""
        try:
            with FileLock(self.path / ".lock", timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # of somebody else's, where nothing can be written
            return False

    def holder(self) -> int | None:
        """The process that is writing here, where the system tells; else None.

        Linux tells it of the user's own processes.
        """
        lock = (self.path / ".lock").resolve()
        found: list[int] = []
        for opened in Path("/proc").glob("[0-9]*/fd/*"):
            with suppress(OSError):
                process = opened.parent.parent
                if opened.readlink() == lock and "FLOCK" in (process / "fdinfo" / opened.name).read_text():
                    found.append(int(process.name))
        return min(found, default=None)

    def record(self, event: dict[str, Any]) -> None:
        """Appends one event, and keeps the proxy of a proposal that lives as a file of its own.

        Raises `StorageMistake` where that cannot be written.
        """
        with self._writing:
            events.append(self.log_of_events, event)
        if event["event"] in ("proposed", "refined") and not event["failure"]:
            proxy = Proxy(event["thought"], event["code"])
            write(self.path / "proxies" / f"{event['name']}.py", as_file(proxy))

    def events(self) -> list[dict[str, Any]]:
        """Every event so far; lines that are not what was written are left out."""
        return events.read(self.log_of_events)

    def identity(self) -> str:
        """Tells this run from all others, its forks too, and stays when the folder is moved; raises `RunMistake`."""
        told = self.events()
        lines = [event["line"] for event in told if "line" in event]
        threads = [event["thread"] for event in told if "thread" in event]
        if not lines and not threads:
            raise RunMistake(f"{self.path} does not say which run it is: its events.jsonl tells of no start.")
        return str(lines[-1] if lines else threads[0])

    def allocations(self) -> dict[str, list[Bits]]:
        """Those of each candidate whose proposal is on record, one a network."""
        proposed = {event["name"]: event["allocations"] for event in self.events() if event["event"] == "proposed"}
        return {name: [Bits.model_validate(bits) for bits in its] for name, its in proposed.items()}

    def refinements(self) -> list[Candidate]:
        """What conversations made of the candidates, as far as that is on record."""
        found = {event["name"]: event for event in self.events() if event["event"] == "refined"}
        return [Candidate.model_validate(event) for event in found.values()]

    def finished(self) -> Result:
        """What the run has come to; raises `RunMistake` when that is nothing yet."""
        result = self.result()
        if result is None:
            next_step = "wait for it" if self.is_held() else f"continue it with `tap-agent resume {self.path}`"
            raise RunMistake(f"{self.path} has not ended: {next_step}.")
        return result

    def has_ended(self) -> bool:
        """Whether the run has finished, rather than been stopped by a limit or not come to a result."""
        result = self.result()
        return result is not None and result.stopped is None

    def seconds(self) -> float:
        """Time spent on the run, without the pauses between its sessions."""
        return events.seconds(self.events())

    def measured(self) -> int:
        """Values that all sessions of the run had to measure."""
        return events.measured(self.events())

    def save(self, result: Result, best: dict[str, Any], page: str | None, replay: str) -> None:
        """Writes the best allocation, the report if there is one, the replay, and last the result, which marks the run
        as ended."""
        write(self.best, json.dumps(best, indent=1))
        write(self.path / "replay.jsonl", replay)
        if page is not None:
            write(self.report, page)
        write_sealed(self.outcome, result.model_dump_json(indent=1))

    def extend(self, result: Result, page: str) -> None:
        """Writes a result to which a conversation has added, and its report."""
        write(self.report, page)
        write_sealed(self.outcome, result.model_dump_json(indent=1))

    def result(self) -> Result | None:
        """The result of a run that has finished, or that a limit has stopped; raises `DamagedMistake`."""
        return read_result(self.outcome, self.mends) if self.outcome.exists() else None


def read_result(path: Path, next_step: str) -> Result:
    """The result in a file; raises `DamagedMistake`, with `next_step`, where it is not what was written."""
    text = sealed.read(path, next_step)
    try:
        return Result.model_validate_json(text)
    except ValidationError as error:
        raise sealed.damaged(path, sealed.Damage("holds no result"), next_step) from error


@contextmanager
def _locked(path: Path, busy: str, patience: float = 0.2) -> Iterator[None]:
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=patience, poll_interval=0.02)  # no shorter than `is_held` has it
    except Timeout as error:
        raise RunMistake(busy) from error
    except OSError as error:
        raise RunMistake(f"{path.parent} cannot be written ({error}): see to its permissions, or copy it.") from error
    try:
        yield
    finally:
        lock.release()


def usual_path(settings: Settings) -> Path:
    """Where a run goes that was given no place of its own."""
    return RUNS / usual_name(settings.networks[0].network)


def usual_name(network: str) -> str:
    """Of such a folder, in which runs on this network are told apart by when they began."""
    word = re.sub(r"[^\w.-]+", "-", network)[:_LONGEST_NAME]
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{word}"


def make_parent(path: Path) -> None:
    """The folder that `path` goes into; raises `RunMistake` when there can be none, or it takes no files."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunMistake(f"{path} cannot be written ({error}): give another --out.") from error
    check_parent(path)


def check_unused(path: Path) -> None:
    """Raises `RunMistake` where no run can be begun at `path`; leaves nothing."""
    check_parent(path)
    if os.path.lexists(path):
        raise _taken(path)


def check_parent(path: Path) -> None:
    """Raises `RunMistake` where no folder for `path` can be made, or it takes no files; leaves nothing."""
    try:
        there = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
        with suppress(FileNotFoundError):
            path.lstat()  # which tells of a name that is too long
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise RunMistake(f"{path} cannot be written ({error}): give another --out.") from error


def check_file(path: Path) -> None:
    """Raises `RunMistake` when no file can be written to `path`."""
    make_parent(path)
    if path.is_dir():
        raise RunMistake(f"{path} is a folder: give --out the name of a file.")


def check_apart(written: Sequence[Path | None], read: Iterable[Path | None]) -> None:
    """Raises `RunMistake` when a file is to be written over one that is read, or two are the same."""
    taken = {os.path.realpath(file) for file in read if file}
    for path in filter(None, written):
        if os.path.realpath(path) in taken:
            raise RunMistake(f"{path} is read by this command, or would be written twice: give another file.")
        taken.add(os.path.realpath(path))


def as_file(proxy: Proxy) -> str:
    """A proxy as a Python file, with its thought as the docstring."""
    if re.match(r'\s*(?:"""|\'\'\')', proxy.code):
        return proxy.code
    thought = proxy.thought.replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{thought}\n"""\n\n{proxy.code.lstrip()}'


def find(path: Path) -> RunFolder:
    """A run by its folder, or by its name in `RUNS`; raises `RunMistake`."""
    return RunFolder(path if path.exists() or not (RUNS / path).exists() else RUNS / path)


def runs(folder: Path) -> list[RunFolder]:
    """The runs under `folder`, the newest first."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if path.name.isprintable() and readable(path)]  # others cannot be shown
    found: list[tuple[float, RunFolder]] = []
    for path in named:
        with suppress(OSError, RunMistake):  # of a folder that may not be entered
            run = RunFolder(path)
            found.append((run.config.stat().st_mtime, run))
    return [run for _, run in sorted(found, key=lambda each: each[0], reverse=True)]
