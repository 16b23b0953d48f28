"""The searches of a folder: each in a line, and those started, stopped and resumed from the page."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path

from tap_agent.page.form import arguments, filled
from tap_agent.page.process import SearchProcess, stop
from tap_agent.runs.folder import RunFolder, RunMistake, runs, usual_name
from tap_agent.runs.progress import Overview, overview


class Searches:
    """Starts, stops and resumes searches; safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """`folder` is where the runs are, which need not be there yet."""
        self.folder = folder
        self._processes: dict[str, SearchProcess] = {}
        self._forms: dict[str, Mapping[str, str]] = {}
        self._stopping: set[str] = set()
        self._lock = threading.RLock()

    def run(self, name: str) -> RunFolder | None:
        """A run by its name: none that is not in the folder can be named."""
        return next((run for run in runs(self.folder) if run.name == name), None)

    def process(self, name: str) -> SearchProcess | None:
        """The latest start of a run from here."""
        return self._processes.get(name)

    def form(self, name: str) -> Mapping[str, str]:
        """What was asked for when a run was started from here."""
        return self._forms.get(name, {})

    def overviews(self) -> list[Overview]:
        """Every run in a line, those first that have no folder yet."""
        with self._lock:
            early = [
                Overview(name, "stopping" if process.stopping else "starting", self.form(name).get("network", "digits"))
                for name, process in self._processes.items()
                if process.running and not process.path.is_dir()
            ]
            return [*early, *map(self._overview, runs(self.folder))]

    def _overview(self, run: RunFolder) -> Overview:
        process = self._processes.get(run.name)
        found = overview(run, True if process and process.running else None)
        if found.state != "running":
            self._stopping.discard(run.name)
        stopping = run.name in self._stopping or (process and process.running and process.stopping)
        return dataclasses.replace(found, state="stopping") if found.state == "running" and stopping else found

    def start(self, form: Mapping[str, str]) -> str:
        """Starts a search with the flags in `form`, and gives the name of its run; raises `RunMistake`."""
        given = filled("run", form)
        name = usual_name(given.get("network", "digits"))
        with self._lock:
            if name in self._processes or (self.folder / name).exists():
                raise RunMistake(f"{name} has just been started: wait a second to start another.")
            path = self.folder / name
            self._processes[name] = SearchProcess(path, ["run", *arguments(given), f"--out={path}"])
            self._forms[name] = given
        return name

    def resume(self, run: RunFolder, form: Mapping[str, str]) -> None:
        """Continues a search, with the limits in `form`; raises `RunMistake` when a process writes it."""
        limits = arguments(filled("resume", form))
        with self._lock:
            process = self._processes.get(run.name)
            if (process and process.running) or run.is_held():
                raise RunMistake(f"{run.path} is being written by another process: wait for it, or stop it.")
            self._processes[run.name] = SearchProcess(run.path, ["resume", str(run.path), *limits])

    def stop(self, name: str) -> None:
        """Asks a search to end, as Ctrl-C does; raises `RunMistake` when it cannot be asked from here."""
        with self._lock:
            process, run = self._processes.get(name), self.run(name)
            if process and process.running:
                process.stop()
            elif run and run.is_held():
                stop(run)
                self._stopping.add(name)
            else:
                raise RunMistake(f"{name} is not running.")
