"""Files of a run, written whole or not at all, and sealed where they are read back (see `tap_eval.sealed`)."""

from __future__ import annotations

from pathlib import Path

from tap_eval import sealed
from tap_eval.storage import replacing, settle


def write(path: Path, text: str) -> None:
    """Replaces the file at `path`, whole or not at all; raises `StorageMistake`."""
    with replacing(path) as fresh:
        fresh.write_text(text)


def write_sealed(path: Path, text: str) -> None:
    """The same with text that is read back, which no loss of power takes away again."""
    with replacing(path) as fresh:
        put_sealed(fresh, text)
    settle(path.parent)


def put_sealed(path: Path, text: str) -> None:
    """Writes text that is read back to a file that nobody reads yet, and waits until it is on the disk."""
    path.write_text(sealed.sealed(text))
    settle(path)
