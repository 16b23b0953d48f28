"""What is read back begins with a seal: the version of its form, and a digest of the rest.

So what was cut, changed or written by a newer version is told from what is whole, whatever it holds: files of JSON and
YAML, lines of JSON, and texts in databases, by the same few letters. What was written before there were seals has none,
and is taken as it is.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from contextlib import closing
from pathlib import Path

from tap_eval.mistake import DamagedMistake
from tap_eval.storage import RUN, writing

VERSION = 1
"""of everything that is sealed; what has a higher one was written by a newer program"""
UPDATE = "update tap-agent"
_HEAD = re.compile(r'(?:# |\{")sealed"?: "?(\d+) ([0-9a-f]{16})(?:",|\n)')
_STARTS = ("# sealed", '{"sealed')
"""what begins like one of these, but for a letter or for the end, and not with a whole seal, is damaged"""


class Damage(ValueError):
    """Something that is not what was written; `str()` of it says how, as a predicate."""


class Newer(Damage):
    """Something that a newer version of the program wrote."""


def newer(version: int) -> Newer:
    """What is said of a form that this program does not know yet."""
    return Newer(f"was written by a newer version of tap-agent (form {version}, and this one knows {VERSION})")


def digest(content: bytes) -> str:
    """Names `content`, in 16 letters."""
    return hashlib.sha256(content).hexdigest()[:16]


def sealed(text: str) -> str:
    """`text`, which is YAML or a JSON object, with its seal: a comment, or the first member."""
    mark = f"{VERSION} {_mark(VERSION, text)}"
    return f'{{"sealed": "{mark}",{text[1:]}' if text.startswith("{") else f"# sealed: {mark}\n{text}"


def unsealed(text: str) -> str:
    """What `sealed` was given; what has no seal as it is. Raises `Damage`."""
    if not text.strip():
        raise Damage("is empty")
    head = _HEAD.match(text)
    if head is None:
        if any(_is_nearly(text, start) for start in _STARTS):
            raise Damage("is not what was written")
        return text
    rest = ("{" if text.startswith("{") else "") + text[head.end() :]
    if head[2] != _mark(int(head[1]), rest):
        raise Damage("is not what was written")
    if int(head[1]) > VERSION:
        raise newer(int(head[1]))
    return rest


def read(path: Path, next_step: str) -> str:
    """The text of a sealed file, without its seal.

    Raises `DamagedMistake`, with `next_step` for the user, where it is not what was written.
    """
    try:
        return unsealed(path.read_text())
    except (Damage, UnicodeDecodeError) as error:
        raise damaged(path, error, next_step) from error


def damaged(path: Path, why: Exception, next_step: str) -> DamagedMistake:
    """The sentence about a file that is not what was written."""
    if isinstance(why, Newer):
        return DamagedMistake(f"{path} {why}: {UPDATE}.", newer=True)
    how = str(why) if isinstance(why, Damage) else f"is not what was written ({' '.join(str(why).split())})"
    return DamagedMistake(f"{path} {how}: {next_step}.")


def check_database(path: Path, next_step: str) -> None:
    """Raises `DamagedMistake` unless the SQLite file at `path` is whole, and of this version or before, or not there.

    What is in its rows is for others to check.
    """
    if not path.exists():
        return
    try:
        with writing(path, RUN), closing(sqlite3.connect(path, timeout=60)) as database:
            (sound,) = database.execute("PRAGMA quick_check(1)").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        raise damaged(path, error, next_step) from error
    if sound != "ok":
        raise damaged(path, Damage("is not what was written (its pages are malformed)"), next_step)
    if version > VERSION:
        raise damaged(path, newer(version), next_step)


def mark_database(database: sqlite3.Connection) -> None:
    """Writes the version into a database that has none yet."""
    if database.execute("PRAGMA user_version").fetchone() == (0,):
        database.execute(f"PRAGMA user_version = {VERSION}")


def is_damage(error: Exception) -> bool:
    """Whether a database says that it is none, or damaged."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, sqlite3.Error) and code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


def _is_nearly(text: str, start: str) -> bool:
    if len(text) < len(start):
        return start.startswith(text)
    return sum(one != other for one, other in zip(text, start, strict=False)) <= 1


def _mark(version: int, text: str) -> str:
    return digest(f"{version} {text}".encode())
