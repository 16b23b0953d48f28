"""The events of a run, a sealed line of JSON each: a record, without which a run goes on as well."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tap_eval import sealed
from tap_eval.storage import RUN, writing

Event = dict[str, Any]
_ALONE = {"started", "forked", "refined"}
"""events that nothing else holds, and that are on the disk before anything follows from them"""
_AFTER = {"refined", "forked"}
"""events that come at any time after a session"""


def append(path: Path, event: Mapping[str, Any]) -> None:
    """Writes down an event at the end of the file at `path`; raises `StorageMistake`."""
    stamped = {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"), **event}
    with writing(path, RUN), path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
            file.write(b"\n")  # after a line that a crash cut short
        file.write(sealed.sealed(json.dumps(stamped)).encode() + b"\n")
        if event["event"] in _ALONE:
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[Event]:
    """Those in the file at `path`, without lines that are not what was written, as one that a crash cut short."""
    return [event for event in map(_event, _lines(path)) if event]


def damaged(path: Path) -> int:
    """How many lines `read` leaves out, but for a last one that a crash cut short."""
    return sum(_event(line) is None for line in _lines(path)[:-1])


def seconds(events: Sequence[Event]) -> float:
    """Time spent on a run, without the pauses between its sessions.

    Each session counts its own by a clock that nobody sets. Of sessions of before there was that, the clock on the wall
    tells, and counts nothing where it was put back.
    """
    total, started, last = 0.0, None, None
    for event in events:
        if event["event"] in _AFTER:
            continue
        at = datetime.datetime.fromisoformat(event["at"])
        if event["event"] in ("started", "resumed"):
            started = at
        if started and last and started != at:
            total += max((at - last).total_seconds(), 0.0)
        last, total = at, event.get("elapsed", total)
    return total


def measured(events: Sequence[Event]) -> int:
    """Values that all sessions had to measure, by the counter on their events."""
    sessions = [0]
    for event in events:
        if event["event"] in ("started", "resumed"):
            sessions.append(0)
        sessions[-1] = max(sessions[-1], event.get("measured", 0))
    return sum(sessions)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").split("\n") if path.exists() else []


def _event(line: str) -> Event | None:
    """What a line tells; None where it is not what was written."""
    try:
        event = json.loads(sealed.unsealed(line))
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and {"event", "at"} <= event.keys() else None
