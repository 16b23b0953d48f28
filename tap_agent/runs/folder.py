"""A run's folder: its config, checkpoints, events, proxies, result and report.

Files are written whole or not at all, and a folder belongs to one process at a time.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout

from graphs.state import Bits
from tap_agent.paths import RUNS
from tap_agent.runs.result import Result
from tap_agent.settings.model import Settings
from tap_agent.settings.read import Given, dump, read_settings, read_yaml
from tap_eval.mistake import Mistake
from tap_eval.proxies.proxy import Proxy

NETWORKS = (".safetensors", ".onnx")
"""endings of files with a network in them"""
_BEFORE = {"rounding": "nearest", "sums": "float", "worth": "accuracy", "second_budget": False}
"""what runs did before there were such settings, which are all in the configs of later ones"""


class RunMistake(Mistake):
    """A run folder that is none, or that cannot be used for what was asked."""

    kind = "run"


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
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as fresh:
            (Path(fresh) / "config.yaml").write_text(dump(settings))
            (Path(fresh) / "proxies").mkdir()
            try:
                path.mkdir()
            except FileExistsError as error:
                raise RunMistake(
                    f"{path} exists already: give another --out, or continue it with `tap-agent resume {path}`."
                ) from error
            for entry in ("proxies", "config.yaml"):
                os.replace(Path(fresh) / entry, path / entry)
        return RunFolder(path)

    @staticmethod
    def unused(path: Path, settings: Settings) -> RunFolder:
        """A new folder at `path`, or beside it with a number where that is taken."""
        names = (path.with_name(f"{path.name}{end}") for end in ("", *(f"-{n}" for n in range(2, 10_000))))
        return RunFolder.create(next(name for name in names if not name.exists()), settings)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

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
        """The resolved config with which the run was started, with `flags` over it; raises `ConfigMistake`."""
        return read_settings(self.given, flags)

    @property
    def given(self) -> Given:
        """What its config says, and what its version did where there was no such setting."""
        config = self.path / "config.yaml"
        values = read_yaml(config)
        if "worth" not in values and values.get("controller") == "ratio":
            values["controller"] = "paper"
        return Given(config, _BEFORE | values)

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
        """Appends one event, and keeps the proxy of a proposal that lives as a file of its own."""
        stamped = {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"), **event}
        with self._writing, (self.path / "events.jsonl").open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.write(b"\n")  # after a line that a crash cut short
            file.write(json.dumps(stamped).encode() + b"\n")
        if event["event"] in ("proposed", "refined") and not event["failure"]:
            proxy = Proxy(event["thought"], event["code"])
            write(self.path / "proxies" / f"{event['name']}.py", as_file(proxy))

    def events(self) -> list[dict[str, Any]]:
        """Every event so far; lines that a crash cut short are left out."""
        path = self.path / "events.jsonl"
        found: list[dict[str, Any]] = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with suppress(json.JSONDecodeError):
                event = json.loads(line)
                if isinstance(event, dict) and {"event", "at"} <= event.keys():
                    found.append(event)
        return found

    def identity(self) -> str:
        """Tells this run from all others, its forks too, and stays when the folder is moved; raises `RunMistake`."""
        events = self.events()
        lines = [event["line"] for event in events if "line" in event]
        threads = [event["thread"] for event in events if "thread" in event]
        if not lines and not threads:
            raise RunMistake(f"{self.path} does not say which run it is: its events.jsonl tells of no start.")
        return str(lines[-1] if lines else threads[0])

    def allocations(self, name: str) -> list[Bits]:
        """Those of a candidate that the run has proposed, one a network."""
        proposals = [event for event in self.events() if event["event"] == "proposed" and event["name"] == name]
        return [Bits.model_validate(bits) for bits in proposals[-1]["allocations"]]

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
        total, started, last = 0.0, None, None
        for event in self.events():
            if event["event"] in ("refined", "forked"):  # these come at any time after
                continue
            at = datetime.datetime.fromisoformat(event["at"])
            if event["event"] in ("started", "resumed"):
                started = at
            if started and last and started != at:
                total += (at - last).total_seconds()
            last = at
        return total

    def measured(self) -> int:
        """Values that all sessions of the run had to measure, by the counter on their events."""
        sessions = [0]
        for event in self.events():
            if event["event"] in ("started", "resumed"):
                sessions.append(0)
            sessions[-1] = max(sessions[-1], event.get("measured", 0))
        return sum(sessions)

    def save(self, result: Result, best: dict[str, Any], page: str | None, replay: str) -> None:
        """Writes the best allocation, the report if there is one, the replay, and last the result, which marks the run
        as ended."""
        write(self.best, json.dumps(best, indent=1))
        write(self.path / "replay.jsonl", replay)
        if page is not None:
            write(self.report, page)
        write(self.path / "result.json", result.model_dump_json(indent=1))

    def extend(self, result: Result, page: str) -> None:
        """Writes a result to which a conversation has added, and its report."""
        write(self.report, page)
        write(self.path / "result.json", result.model_dump_json(indent=1))

    def result(self) -> Result | None:
        """The result of a run that has finished, or that a limit has stopped."""
        path = self.path / "result.json"
        return Result.model_validate_json(path.read_text()) if path.exists() else None


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
    return RUNS / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{settings.networks[0].network.replace(':', '-')}"


def make_parent(path: Path) -> None:
    """The folder that `path` goes into; raises `RunMistake` when there can be none, or it takes no files."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunMistake(f"{path} cannot be written ({error}): give another --out.") from error
    check_parent(path)


def check_parent(path: Path) -> None:
    """Raises `RunMistake` where no folder for `path` can be made, or it takes no files; leaves nothing."""
    there = next(parent for parent in path.resolve().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise RunMistake(f"{path} cannot be written ({error}): give another --out.") from error


def check_file(path: Path) -> None:
    """Raises `RunMistake` when no file can be written to `path`."""
    make_parent(path)
    if path.is_dir():
        raise RunMistake(f"{path} is a folder: give --out the name of a file.")


def write(path: Path, text: str) -> None:
    """Replaces the file at `path` at once."""
    with replacing(path) as fresh:
        fresh.write_text(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of the file at `path`, at once and as soon as it is written."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as fresh:
        yield Path(fresh) / path.name
        os.replace(Path(fresh) / path.name, path)


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
    named = [path for path in folder.iterdir() if path.name.isprintable()]  # others cannot be shown
    found = [RunFolder(path) for path in named if (path / "config.yaml").is_file()]
    return sorted(found, key=lambda run: (run.path / "config.yaml").stat().st_mtime, reverse=True)
