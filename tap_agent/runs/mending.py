"""What resuming does about files of a run that are not what was written: puts them aside, and makes them anew.

A search follows from its settings, from the answers of language models, which are in calls.sqlite, and from
measurements, which are in the cache. So its checkpoints and its result can be had again, without a further call; its
settings are in the event with which it started. What cannot be had again is named, and stays where it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tap_agent.runs import checkpoints, events
from tap_agent.runs.files import write_sealed
from tap_agent.runs.folder import RunFolder
from tap_agent.settings.read import dump, read_settings
from tap_eval import sealed
from tap_eval.mistake import DamagedMistake

_LOST = "put it back from a copy, or begin anew with `tap-agent run`"


def mend(folder: RunFolder) -> list[str]:
    """A sentence on each file that was made anew, or that will be when the run goes on.

    Raises `DamagedMistake` of one that cannot be, and of one of a newer version. The caller is to hold the folder.
    """
    return [*_config(folder), *_steps(folder), *_result(folder), *_events(folder)]


def check_calls(folder: RunFolder) -> None:
    """Raises `DamagedMistake` where the account of the run, which says what it has spent, is not what was written."""
    step = (
        f"put it back from a copy, or move it away, after which `tap-agent resume {folder.path}` asks again for what "
        "was answered, and counts nothing that was spent before"
    )
    sealed.check_database(folder.calls, step)
    began = any(event["event"] == "proposed" for event in folder.events())
    if began and folder.calls.exists() and not folder.calls.stat().st_size:
        raise sealed.damaged(folder.calls, sealed.Damage("is empty"), step)


def _config(folder: RunFolder) -> Iterator[str]:
    started = next((event["settings"] for event in folder.events() if "settings" in event), None)

    def anew() -> None:
        if started is None:
            raise sealed.damaged(folder.config, sealed.Damage("is not what was written"), _LOST)
        write_sealed(folder.config, dump(read_settings(None, started)))

    yield from _tried(folder.settings, folder.config, "is written anew from the event with which the run began", anew)


def _steps(folder: RunFolder) -> Iterator[str]:
    path = folder.checkpoints

    def anew() -> None:
        if any(event["event"] == "forked" for event in folder.events()):  # its state may have been changed by hand
            raise sealed.damaged(path, sealed.Damage("is not what was written"), _LOST)
        for each in (path, *_beside(path)):
            each.unlink(missing_ok=True)

    again = "its steps are done again from what was answered and measured"
    yield from _tried(lambda: checkpoints.check(path, folder.mends), path, again, anew)
    if checkpoints.tip_of(folder) is None and any(event["event"] == "proposed" for event in folder.events()):
        yield f"{path} holds no step: {again}"


def _result(folder: RunFolder) -> Iterator[str]:
    path = folder.outcome
    yield from _tried(folder.result, path, "it is written anew", path.unlink)


def _events(folder: RunFolder) -> Iterator[str]:
    if lines := events.damaged(folder.log_of_events):
        yield f"{folder.log_of_events} has lines that are not what was written, and are left out: {lines}"


def _tried(read: Callable[[], Any], path: Path, then: str, anew: Callable[[], None]) -> Iterator[str]:
    """Where `read` finds `path` damaged, keeps it beside under another name, and does `anew`."""
    try:
        read()
    except DamagedMistake as mistake:
        if mistake.newer:
            raise
        aside = path.with_name(f"{path.name}.damaged")
        shutil.copyfile(path, aside)
        anew()
        yield f"{path} is not what was written, and is {aside.name} now: {then}"


def _beside(path: Path) -> list[Path]:
    """What SQLite keeps beside a database."""
    return [path.with_name(f"{path.name}-{end}") for end in ("wal", "shm")]
