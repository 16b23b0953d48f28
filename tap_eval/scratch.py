"""Temporary folders that do not outlive their process for long, however it ends.

A process that is killed removes nothing. So each folder is held by a lock on it that the kernel lets go with the
process, and whoever makes the next one removes those that nobody holds.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

if sys.platform != "win32":  # where there is no such lock, and a folder of a killed process stays
    import fcntl

_PREFIX = "tap-scratch-"
_BESIDE = f".tap-of-{platform.node()}-"
"""of this machine alone: where a folder is shared, other machines need not see its locks"""
_NOT_YET = ".making-"
"""begins a name under which nobody takes a folder for one that is not held"""


@contextmanager
def scratch(place: Path | None = None) -> Iterator[Path]:
    """An empty temporary folder that is gone after the block: hidden in `place`, or where temporary folders are.

    First those go that dead processes have left there, once a process.
    """
    place, prefix = (place, _BESIDE) if place else (Path(tempfile.gettempdir()), _PREFIX)
    _clean(place, prefix)
    folder = Path(tempfile.mkdtemp(prefix=_NOT_YET, dir=place))
    with ExitStack() as held:
        with suppress(OSError):  # where there are no locks, nobody can have this one, and nobody removes it
            held.enter_context(_held(folder))
        folder = folder.rename(folder.with_name(prefix + folder.name.removeprefix(_NOT_YET)))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """With the lock of `folder`; raises `BlockingIOError` where another process has it, `OSError` where none can be."""
    if sys.platform == "win32":
        yield
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


@lru_cache(256)  # once is enough, for looking takes as long as there are files
def _clean(place: Path, prefix: str) -> None:
    if sys.platform == "win32":
        return
    for folder in place.glob(f"{prefix}*"):
        with suppress(OSError):  # another's, held, or gone since
            if folder.lstat().st_uid == os.getuid():
                with _held(folder):
                    shutil.rmtree(folder, ignore_errors=True)
