"""Disks that are full, and folders that take no files: told as what they are, whoever meets them."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tap_eval.mistake import StorageMistake

CACHE = "make room, or point TAP_CACHE at a folder that takes files"
RUN = "make room there or see to its permissions, then go on"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
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


@contextmanager
def writing(path: Path, next_step: str) -> Iterator[None]:
    """Raises `StorageMistake`, which names `path`, where it cannot be written."""
    try:
        yield
    except Exception as error:
        if (reason := trouble(error)) is None:
            raise
        raise StorageMistake(f"{path} cannot be written ({reason}): {next_step}.") from error


def settle(path: Path) -> None:
    """Waits until a file or a folder is on the disk, so that no loss of power takes it back."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
