"""What happens to a file."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from tap_eval.sealed import digest, sealed, unsealed

NEWER = 9
"""a version that no program has yet"""


def cut_at_line(path: Path) -> None:
    """Half of its lines are gone."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))


def cut(path: Path) -> None:
    """Half of its bytes are gone."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flipped(path: Path) -> None:
    """A bit in its middle is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    """Nothing is in it."""
    path.write_bytes(b"")


def newer(path: Path) -> None:
    """A newer version of the program wrote it."""
    if path.suffix == ".sqlite":
        with closing(sqlite3.connect(path)) as database:
            database.execute(f"PRAGMA user_version = {NEWER}")
        return
    text = unsealed(path.read_text())
    mark = f"{NEWER} {digest(f'{NEWER} {text}'.encode())}"
    path.write_text(f'{{"sealed": "{mark}",{text[1:]}' if text.startswith("{") else f"# sealed: {mark}\n{text}")


def step_flipped(path: Path) -> None:
    """A bit in the last step of a search is another, which the database does not see."""
    with closing(sqlite3.connect(path)) as database, database:
        (content,) = database.execute("SELECT checkpoint FROM checkpoints ORDER BY checkpoint_id DESC").fetchone()
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        database.execute("UPDATE checkpoints SET checkpoint = ?", (bytes(changed),))


def tail_lost(path: Path) -> None:
    """Of its lines only the first is on the disk, as after a loss of power."""
    path.write_text(path.read_text().splitlines(keepends=True)[0])


def of_another_day(path: Path) -> None:
    """The clock was ten years ahead when its later half was written."""
    lines = path.read_text().splitlines()
    later = [unsealed(line).replace('"at": "20', '"at": "21', 1) for line in lines[len(lines) // 2 :]]
    path.write_text("".join(f"{line}\n" for line in [*lines[: len(lines) // 2], *map(sealed, later)]))
