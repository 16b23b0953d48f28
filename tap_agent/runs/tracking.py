"""A run followed elsewhere: its numbers and files in MLflow or TensorBoard, through their own libraries.

A tracker listens to the same events as the display. When it begins it goes through the run's
events from the first and sends what the store does not have, so a run that was interrupted,
or whose store was away, ends up complete.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx

from graphs.state import TEMPLATES
from tap_agent.runs.folder import RunFolder
from tap_agent.runs.result import Result
from tap_agent.settings.model import Settings, Track
from tap_agent.settings.read import dump
from tap_eval.mistake import Mistake

_NEEDED: dict[Track, tuple[str, ...]] = {
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "tensorboard": ("tensorboard",),
}
_EXPERIMENT = "tap"
_THREAD = "tap.thread"
"""tag of an MLflow run: the thread of the search, or the line of a fork, by which a resumed run finds it again"""
Numbers = Mapping[str, float]
Status = Literal["FINISHED", "FAILED", "KILLED"]


class TrackMistake(Mistake):
    """A store that is not installed or cannot be reached."""

    kind = "tracking"


class Store(Protocol):
    """Where numbers and files of one run go."""

    def sent(self) -> set[tuple[str, int]]:
        """Name and step of every number that it has."""
        ...

    def numbers(self, numbers: Numbers, step: int, at: datetime.datetime) -> None:
        """Keeps `numbers`, by name."""
        ...

    def files(self, files: Sequence[Path], step: int) -> None:
        """Keeps files of the run folder, in place of those of an earlier step."""
        ...

    def end(self, status: Status) -> None:
        """Closes the run, which may be opened again."""
        ...


def check(track: Track | None) -> None:
    """Raises `TrackMistake` when what `track` needs is not there; writes nothing."""
    if track is None:
        return
    missing = [name for name in _NEEDED[track] if importlib.util.find_spec(name) is None]
    if missing:
        raise TrackMistake(f"--track {track} needs {', '.join(missing)}: pip install -e '.[{track}]'.")
    where = os.environ.get("MLFLOW_TRACKING_URI", "")
    if track == "mlflow" and where.startswith("http"):
        try:
            httpx.get(where, timeout=10)
        except (httpx.HTTPError, httpx.InvalidURL, ImportError, OSError, ValueError) as error:  # of proxies too
            raise TrackMistake(
                f"the MLflow server of MLFLOW_TRACKING_URI does not answer ({_clean(error)}): start it, or unset the "
                "variable to keep the run in a local file."
            ) from error


class Tracker(AbstractContextManager["Tracker"]):
    """Sends the events of the run in `folder` to the store that `settings` name, if they name one.

    Methods raise `TrackMistake` when the store fails; the run can be resumed, and the store gets
    what it lacks.
    """

    def __init__(self, folder: RunFolder, settings: Settings) -> None:
        self._folder = folder
        self._settings = settings
        self._sent: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._settings.track and "_store" in vars(self) and not (kind and issubclass(kind, TrackMistake)):
            self._store.end("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Sends what `event` tells in numbers."""
        if self._settings.track:
            with self._lock:
                self._send(self._store, event)

    def conclude(self, result: Result) -> None:
        """Sends the accuracies of the final table, the best allocation, the report and the proxy's code.

        Their step is the number of candidates, since a search that a limit has stopped may go on and end better.
        """
        if not self._settings.track:
            return
        step = len(result.candidates)
        self._number(self._store, final_numbers(result), step, datetime.datetime.now(datetime.UTC))
        proxy = self._folder.path / "proxies" / f"{result.best}.py"
        self._store.files([self._folder.path / "best.json", self._folder.report, proxy], step)

    @cached_property
    def _store(self) -> Store:
        events = self._folder.events()  # an event is recorded before it is listened to, so the first is there
        store: Store
        if self._settings.track == "mlflow":
            store = MLflowStore(self._folder, self._settings, self._folder.identity())
        else:
            store = TensorBoardStore(self._folder, self._settings)
        self._sent = store.sent()
        for event in events:
            self._send(store, event)
        return store

    def _send(self, store: Store, event: Mapping[str, Any]) -> None:
        step, numbers = event_numbers(event)
        at = datetime.datetime.fromisoformat(event["at"]) if "at" in event else datetime.datetime.now(datetime.UTC)
        self._number(store, numbers, step, at)

    def _number(self, store: Store, numbers: Numbers, step: int, at: datetime.datetime) -> None:
        fresh = {name: value for name, value in numbers.items() if (name, step) not in self._sent}
        if fresh:
            store.numbers(fresh, step, at)
            self._sent |= {(name, step) for name in fresh}


def event_numbers(event: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """The step and the numbers of an event: of a generation by its index, of a living candidate by its number.

    Drafts have none; an earlier version's candidates have no divergence, and those of a given benchmark no accuracy.
    """
    if event["event"] == "generation":
        offspring = sum(event["offspring"].values())
        numbers = {
            "generation/best": event["best"],
            "generation/mean": event["mean"],
            "generation/failures": sum(event["failures"].values()) / offspring,
            **{f"probability/{template}": event["probabilities"][template] for template in TEMPLATES},
        }
        return event["index"], {name: value for name, value in numbers.items() if value is not None}
    if event["event"] == "judged" and event["fitness"] is not None and event["name"][1:].isdecimal():
        lists = {"accuracy": event["top1"], "kl": event.get("kl"), "foretelling": event.get("foretelling")}
        return int(event["name"][1:]), {
            "candidate/fitness": event["fitness"],
            **{f"candidate/{name}": sum(its) / len(its) for name, its in lists.items() if its},
            "candidate/bytes": event["size_bytes"][0],
        }
    return 0, {}


def final_numbers(result: Result) -> dict[str, float]:
    """Top-1 of the final table on both splits, by row, and by network where there are several."""
    numbers: dict[str, float] = {}
    for row in result.table:
        name = "proxy" if row.kind == "proxy" else row.label
        place = f"{row.network}/{name}" if len(result.shown) > 1 else name
        for split, found in (("test", row.test), ("search", row.search)):
            if found:
                numbers[f"{split}/{re.sub(r'[^A-Za-z0-9_. /-]', '', place)}"] = found.top1
    return numbers


class MLflowStore:
    """A run of the experiment `tap`, in `mlflow.db` beside the run folder unless MLFLOW_TRACKING_URI says where."""

    def __init__(self, folder: RunFolder, settings: Settings, thread: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers that it is used
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        home = folder.path.resolve().parent
        remote = os.environ.get("MLFLOW_TRACKING_URI")
        with _told(folder):
            self._client = MlflowClient(remote or f"sqlite:///{home / 'mlflow.db'}")
            known = self._client.get_experiment_by_name(_EXPERIMENT)
            place = None if remote else (home / "mlflow").as_uri()
            experiment = known.experiment_id if known else self._client.create_experiment(_EXPERIMENT, place)
            found = self._client.search_runs([experiment], f"tags.`{_THREAD}` = '{thread}'", max_results=1)
            if found:
                self._run = found[0].info.run_id
                self._client.update_run(self._run, status="RUNNING")
            else:
                tags = {_THREAD: thread, "tap.folder": str(folder.path.resolve())}
                self._run = self._client.create_run(experiment, tags=tags, run_name=folder.name).info.run_id
                params = [Param(name, value) for name, value in _flat(settings.model_dump(mode="json"))]
                for start in range(0, len(params), 100):  # as many as it takes at once
                    self._client.log_batch(self._run, params=params[start : start + 100])
        self._folder = folder

    def sent(self) -> set[tuple[str, int]]:
        """See `Store.sent`."""
        with _told(self._folder):
            names = self._client.get_run(self._run).data.metrics
            return {
                (name, metric.step) for name in names for metric in self._client.get_metric_history(self._run, name)
            }

    def numbers(self, numbers: Numbers, step: int, at: datetime.datetime) -> None:
        """See `Store.numbers`."""
        from mlflow.entities import Metric

        milliseconds = round(1000 * at.timestamp())
        with _told(self._folder):
            metrics = [Metric(name, value, milliseconds, step) for name, value in numbers.items()]
            self._client.log_batch(self._run, metrics=metrics)

    def files(self, files: Sequence[Path], step: int) -> None:
        """See `Store.files`; a best proxy that is no longer the best stays."""
        with _told(self._folder):
            for file in files:
                self._client.log_artifact(self._run, str(file))

    def end(self, status: Status) -> None:
        """See `Store.end`."""
        with _told(self._folder):
            self._client.set_terminated(self._run, status)


class TensorBoardStore:
    """Event files in `tensorboard` in the run folder, a new one each session."""

    def __init__(self, folder: RunFolder, settings: Settings) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder.path / "tensorboard"
        self._has = self._read()
        self._writer: Any = SummaryWriter(str(self._path))
        self._text("config", dump(settings), 0)

    def _read(self) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self._path.mkdir(exist_ok=True)
        return EventAccumulator(str(self._path), {"scalars": 0}).Reload()

    def sent(self) -> set[tuple[str, int]]:
        """See `Store.sent`."""
        return {(name, one.step) for name in self._has.Tags()["scalars"] for one in self._has.Scalars(name)}

    def numbers(self, numbers: Numbers, step: int, at: datetime.datetime) -> None:
        """See `Store.numbers`."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, walltime=at.timestamp())
        self._writer.flush()

    def files(self, files: Sequence[Path], step: int) -> None:
        """As text, in which TensorBoard shows code; the report, which is a page, stays in the run folder."""
        for file in files:
            if file.suffix != ".html":
                self._text("proxy" if file.suffix == ".py" else file.name, file.read_text(), step)

    def _text(self, name: str, text: str, step: int) -> None:
        tag = f"{name}/text_summary"
        known = self._has.Tensors(tag) if tag in self._has.Tags()["tensors"] else []
        if step not in [each.step for each in known]:
            self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def end(self, status: Status) -> None:
        """See `Store.end`."""
        self._writer.close()


@contextmanager
def _told(folder: RunFolder) -> Iterator[None]:
    """MLflow's failures as a sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise TrackMistake(
            f"MLflow failed ({_clean(error)}): see to its store, then `tap-agent resume {folder.path}`, "
            "which sends what is missing."
        ) from error


def _clean(error: Exception) -> str:
    """On one line, without the password that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))[:200]


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """A config as dotted names and texts."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{index}")
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)
