"""Disks that are full, folders that take no files, files that may not be read: told as what they are, to whoever."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tap_eval.mistake import StorageMistake
from tap_eval.scratch import scratch

CACHE = "make room, or point TAP_CACHE at a folder that takes files"
RUN = "make room there or see to its permissions, then go on"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}
_MISPLACED = {errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
_SQLITE = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
}


def trouble(error: BaseException) -> str | None:
    """Why a file cannot be written, or not even opened, in a few words; None where `error` is about something else."""
    if isinstance(error, sqlite3.Error):
        return str(error) if getattr(error, "sqlite_errorcode", 0) & 0xFF in _SQLITE else None
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOENT and "temporary directory" in str(error):  # Python has tried to write to each
        return "no folder takes temporary files"
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        code = int(found[1])
    return os.strerror(code) if code is not None and code in _FULL | _REFUSED else None


def told(error: BaseException, path: Path | None = None, next_step: str = RUN) -> StorageMistake | None:
    """The sentence about what was in the way of writing `path`, or without one of whatever; None as from `trouble`.

    A file that may not be read is named, and not said to be one that cannot be written.
    """
    if (reason := trouble(error)) is None:
        return None
    met = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else path
    if met and not readable(met):
        return StorageMistake(f"{met} cannot be read ({reason}): see to its permissions, then go on.")
    if path is None and isinstance(error, PermissionError):  # which may have been about reading what cannot be seen
        return StorageMistake(f"{met or 'a file'} cannot be opened ({reason}): see to its permissions, then go on.")
    return StorageMistake(f"{path or met or 'a file'} cannot be written ({reason}): {next_step}.")


def readable(path: Path | str) -> bool:
    """Whether a file or a folder may be read, unless it is not there."""
    may, there = (
        os.access(path, mode, effective_ids=os.access in os.supports_effective_ids) for mode in (os.R_OK, os.F_OK)
    )
    return may or not there


@contextmanager
def writing(path: Path, next_step: str) -> Iterator[None]:
    """Raises `StorageMistake`, which names `path`, where it cannot be written; see `told`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _MISPLACED:
            step = next_step if next_step == CACHE else "give another place"
            raise StorageMistake(f"{path} cannot be written ({os.strerror(error.errno)}): {step}.") from error
        if (mistake := told(error, path, next_step)) is None:
            raise
        raise mistake from error


@contextmanager
def replacing(path: Path, next_step: str = RUN) -> Iterator[Path]:
    """Where to write what takes the place of the file at `path`, whole or not at all; raises `StorageMistake`.

    Its folder is made.
    """
    with writing(path, next_step):
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch(path.parent) as fresh:
            yield fresh / path.name
            os.replace(fresh / path.name, path)


def settle(path: Path) -> None:
    """Waits until a file or a folder is on the disk, so that no loss of power takes it back."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
