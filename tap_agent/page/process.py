"""Searches that the page starts and stops, each a process in a session of its own: the page may go, the search goes on.

What a search prints is kept in `log.txt` of its run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tap_agent.runs.folder import RunFolder, RunMistake, make_parent


class SearchProcess:
    """One `tap-agent run` or `tap-agent resume` that this process has started."""

    def __init__(self, path: Path, arguments: Sequence[str]) -> None:
        """`path` is the folder of the run, which need not be there yet; raises `RunMistake` when it cannot be."""
        make_parent(path)
        self.path = path
        self.stopping = False
        self._last_words = ""
        self._kept = path / "log.txt"
        self._early = path.parent / f".{path.name}.log"
        with (self._kept if path.is_dir() else self._early).open("ab") as log:
            self._start = log.tell()
            self._process = subprocess.Popen(  # noqa: S603 the arguments are checked by the command line
                [sys.executable, "-m", "tap_agent", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "COLUMNS": "120", "PYTHONUNBUFFERED": "1", "TYPER_USE_RICH": "0"},
                start_new_session=True,
            )
        if not path.is_dir():
            threading.Thread(target=self._keep, daemon=True).start()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    @property
    def failure(self) -> str | None:
        """Why the process has ended, unless it did what it should or was stopped: its own sentence."""
        code = self._process.poll()
        if not code or self.stopping:
            return None
        said = self.log.strip()
        sentence = re.findall(r"^[Ee]rror: (.+)", said, re.MULTILINE)
        last = said.splitlines()[-1:] or [f"it ended with exit code {code} and said nothing"]
        return str((sentence or last)[-1])

    @property
    def log(self) -> str:
        """What it has printed."""
        for path in (self._early, self._kept):
            with suppress(FileNotFoundError):
                return path.read_bytes()[self._start :].decode(errors="replace")
        return self._last_words

    def _keep(self) -> None:
        """Moves the log into the folder of the run once there is one, while it is being written; else takes it away."""
        while self.running and not self.path.is_dir():
            time.sleep(0.1)
        if self.path.is_dir():
            os.replace(self._early, self._kept)
        else:
            self._last_words = self.log
            self._early.unlink()

    def stop(self) -> None:
        """Asks it to end, as Ctrl-C does: the calls in flight are finished first."""
        self.stopping = True
        self._process.send_signal(signal.SIGINT)


def stop(folder: RunFolder) -> None:
    """Asks a search to end that another process has started; raises `RunMistake` where it is not known to be one."""
    process = folder.holder()
    try:
        words = Path(f"/proc/{process}/cmdline").read_text().split("\0") if process else []
    except OSError:  # it has just ended
        words = []
    names = {Path(word).name for word in words}
    if process is None or not names & {"tap-agent", "tap_agent"} or not names & {"run", "resume"}:
        raise RunMistake(
            f"{folder.path} is being written by a process that this page did not start: stop it there, with Ctrl-C."
        )
    os.kill(process, signal.SIGINT)
