"""What the page has in hand: the runs of a folder, the searches it started, the conversations it opened."""

from __future__ import annotations

import dataclasses
import datetime
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, get_args

from agents.embedded import EMBEDDED
from tap_agent import flags
from tap_agent.course import Glance, glance
from tap_agent.folder import RunFolder, RunMistake, runs
from tap_agent.page.launch import Launch, stop
from tap_agent.page.talk import Talk
from tap_agent.settings import NetworkSettings, Settings, read_settings
from tap_agent.workshop import Workshop

FIELDS: dict[str, tuple[str, Any]] = {
    "network": ("Network", flags.NetworkOption),
    "weights": ("Weights", flags.WeightsOption),
    "images": ("Images", flags.ImagesOption),
    "calibration": ("Calibration images", flags.CalibrationOption),
    "budget": ("Budget", flags.BudgetOption),
    "bits": ("Bits", flags.BitsOption),
    "generations": ("Generations", flags.GenerationsOption),
    "population": ("Population", flags.PopulationOption),
    "llm": ("Language model", flags.LLMOption),
    "base-url": ("Base URL", flags.BaseURLOption),
    "seed": ("Seed", flags.SeedOption),
    "config": ("Config", flags.ConfigOption),
    "search": ("Search images", flags.SearchRowsOption),
    "test": ("Test images", flags.TestRowsOption),
    "draws": ("Calibration draws", flags.DrawsOption),
    "channel-groups": ("Channel groups", flags.GroupsOption),
    "racing": ("Racing", flags.RacingOption),
    "max-cost": ("Most cost", flags.MaxCostOption),
    "max-calls": ("Most calls", flags.MaxCallsOption),
    "max-minutes": ("Most minutes", flags.MaxMinutesOption),
}
"""the flags of `tap-agent run` that the page has a field for, with its label"""
COMMON = 11
"""of the fields, shown without asking; the others are behind "More settings" """
LIMITS = ("max-cost", "max-calls", "max-minutes")
"""of the fields, those that a run may be resumed with"""
_TALKS_OPEN = 2


class Desk(AbstractContextManager["Desk"]):
    """Starts, stops and resumes searches, and opens conversations; safe to use from several threads."""

    def __init__(self, folder: Path, cache: Path) -> None:
        """`folder` is where the runs are, which need not be there yet."""
        self.folder = folder
        self._cache = cache
        self._launches: dict[str, Launch] = {}
        self._forms: dict[str, Mapping[str, str]] = {}
        self._stopping: set[str] = set()
        self._talks: dict[tuple[str, str], Talk] = {}
        self._left: list[Talk] = []  # with another model than now, and perhaps still in use
        self._lock = threading.RLock()

    def __exit__(self, *_: object) -> None:
        for talk in (*self._talks.values(), *self._left):
            talk.__exit__()

    def run(self, name: str) -> RunFolder | None:
        """A run by its name: none that is not in the folder can be named."""
        return next((run for run in runs(self.folder) if run.name == name), None)

    def launch(self, name: str) -> Launch | None:
        """The latest start of a run from here."""
        return self._launches.get(name)

    def form(self, name: str) -> Mapping[str, str]:
        """What was asked for when a run was started from here."""
        return self._forms.get(name, {})

    def glances(self) -> list[Glance]:
        """Every run in a line, those first that have no folder yet."""
        with self._lock:
            early = [
                Glance(name, "stopping" if launch.stopping else "starting", self.form(name).get("network", "digits"))
                for name, launch in self._launches.items()
                if launch.running and not launch.path.is_dir()
            ]
            return [*early, *map(self._glance, runs(self.folder))]

    def _glance(self, run: RunFolder) -> Glance:
        launch = self._launches.get(run.name)
        found = glance(run, True if launch and launch.running else None)
        if found.state != "running":
            self._stopping.discard(run.name)
        stopping = run.name in self._stopping or (launch and launch.running and launch.stopping)
        return dataclasses.replace(found, state="stopping") if found.state == "running" and stopping else found

    def start(self, form: Mapping[str, str]) -> str:
        """Starts a search with the flags in `form`, and gives the name of its run; raises `RunMistake`."""
        given = {name: form[name].strip() for name in FIELDS if form.get(name, "").strip()}
        word = re.sub(r"[^\w.-]+", "-", Path(given.get("network", "digits")).name)[:60]
        name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{word}"
        with self._lock:
            if name in self._launches or (self.folder / name).exists():
                raise RunMistake(f"{name} has just been started: wait a second to start another.")
            arguments = [f"--{flag}={value}" for flag, value in given.items()]
            path = self.folder / name
            self._launches[name] = Launch(path, ["run", *arguments, f"--out={path}"])
            self._forms[name] = given
        return name

    def resume(self, run: RunFolder, form: Mapping[str, str]) -> None:
        """Continues a search, with the limits in `form`; raises `RunMistake` when a process writes it."""
        limits = [f"--{name}={form[name].strip()}" for name in LIMITS if form.get(name, "").strip()]
        with self._lock:
            launch = self._launches.get(run.name)
            if (launch and launch.running) or run.is_held():
                raise RunMistake(f"{run.path} is being written by another process: wait for it, or stop it.")
            self._launches[run.name] = Launch(run.path, ["resume", str(run.path), *limits])

    def stop(self, name: str) -> None:
        """Asks a search to end, as Ctrl-C does; raises `RunMistake` when it cannot be asked from here."""
        with self._lock:
            launch, run = self._launches.get(name), self.run(name)
            if launch and launch.running:
                launch.stop()
            elif run and run.is_held():
                stop(run)
                self._stopping.add(name)
            else:
                raise RunMistake(f"{name} is not running.")

    @contextmanager
    def talk(self, run: RunFolder, proxy: str) -> Iterator[Talk]:
        """The conversation about a proxy of a run that has ended, to be used meanwhile; raises a `Mistake`."""
        with self._lock:
            if (run.name, proxy) not in self._talks:
                self._open(run, proxy, run.settings())
            talk = self._talks[run.name, proxy]
            talk.users += 1
        try:
            yield talk
        finally:
            with self._lock:
                talk.users -= 1
                self._close()

    def change_model(self, run: RunFolder, proxy: str, llm: str, base_url: str) -> None:
        """Goes on with another language model; raises a `Mistake` when it cannot be asked."""
        flags = {"llm": llm.strip() or None, "base_url": base_url.strip() or None}
        settings = read_settings(run.path / "config.yaml", flags)
        if settings.llm != EMBEDDED:
            Workshop(settings, self._cache).models.check()
        with self._lock:
            if (talk := self._talks.get((run.name, proxy))) and talk.busy:
                raise RunMistake("an answer is still coming: wait for it, or stop it.")
            self._open(run, proxy, settings)

    def _open(self, run: RunFolder, proxy: str, settings: Settings) -> None:
        """Opens a conversation, in place of the one about the same proxy."""
        opened = Talk(run, proxy, settings, self._cache)
        if before := self._talks.pop((run.name, proxy), None):
            self._left.append(before)
        self._talks[run.name, proxy] = opened

    def _close(self) -> None:
        """Closes what nobody uses: those with another model, and of the others the oldest beyond `_TALKS_OPEN`."""
        idle = [key for key, talk in self._talks.items() if not (talk.users or talk.busy)]
        for key in idle[: max(0, len(self._talks) - _TALKS_OPEN)]:
            self._left.append(self._talks.pop(key))
        for talk in [talk for talk in self._left if not (talk.users or talk.busy)]:
            self._left.remove(talk)
            talk.__exit__()


def fields(given: Mapping[str, str]) -> list[dict[str, Any]]:
    """The fields of the form: name, label, help, what is taken when it is left empty, and what was given before."""
    defaults = {
        **NetworkSettings().model_dump(),
        **{name.replace("_", "-"): value for name, value in Settings().model_dump().items()},
        "config": None,
        "draws": Settings().calibration_draws,
        "bits": ",".join(map(str, Settings().bits)),
    }
    found: list[dict[str, Any]] = []
    for name, (label, option) in FIELDS.items():
        kind, about = get_args(option)
        found.append(
            {
                "name": name,
                "label": label,
                "help": re.sub(r"--([a-z-]+)", lambda flag: f"“{FIELDS[flag[1]][0]}”", about.help).replace(
                    "flags", "fields"
                ),
                "default": "" if defaults[name] is None else str(defaults[name]),
                "given": given.get(name, ""),
                "step": {int: "1", float: "any"}.get(get_args(kind)[0], ""),
            }
        )
    return found
