"""Where the server writes a search: on in the folder of its branch, or in a fork of it; see `runs.checkpoints`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tap_agent.runs.checkpoints import fork, holds, tip_of
from tap_agent.runs.folder import RunFolder, usual_path
from tap_agent.sessions.search import first_event
from tap_agent.settings.fields import flagged
from tap_agent.settings.model import Settings
from tap_agent.settings.read import ConfigMistake, read_settings
from tap_eval.mistake import Mistake

CHANGEABLE = {setting.name for setting in flagged("resume")}
"""the settings that a run may go on with anew, as with `tap-agent resume`"""


class ThreadMistake(Mistake):
    """Something that a thread cannot do, being a search."""

    kind = "run"


class RunWriter:
    """The run folder that one access of a server writes to: found or made, and held, when it is first needed.

    Its events and checkpoints may come from any thread. After `close` nothing is written any
    more, whatever is still running.
    """

    def __init__(
        self,
        thread: str,
        settings: Settings,
        find: Callable[[], RunFolder],
        first: Mapping[str, Any] | None,
        begun: bool,
    ) -> None:
        """`first` is the event that the folder is given before all others."""
        self.thread = thread
        self.settings = settings
        self._find = find
        self._first = first
        self._begun = begun
        self._finding = threading.Lock()
        self._held = ExitStack()
        self._folder: RunFolder | None = None
        self._over: Exception | None = None

    def folder(self) -> RunFolder:
        """The folder; raises `RunMistake` when another process is writing there."""
        with self._finding:
            if self._over:
                raise self._over
            if self._folder is None:
                folder = self._find()
                self._held.enter_context(folder.held())
                if self._first:
                    folder.record(dict(self._first))
                self._folder = folder
            return self._folder

    def admit(self, source: str) -> None:
        """Raises `ThreadMistake` for the input of a search that has begun; nothing is written after it."""
        if source == "input" and self._begun:
            self._over = ThreadMistake(
                f"thread {self.thread} is a search that has begun: go on without an input, fork it from one of its "
                "checkpoints, or start a new thread."
            )
            raise self._over

    def database(self) -> Path:
        """Where its checkpoints go."""
        return self.folder().checkpoints

    def close(self) -> None:
        """Lets go of the folder."""
        with self._finding:
            self._over = self._over or RuntimeError("the session of this search is over")
            self._held.close()


def begin(folder: Path, thread: str, given: Mapping[str, Any]) -> RunWriter:
    """A new search under `folder`, with the settings that are `given`; raises `ConfigMistake`.

    All of its steps are kept, which Studio goes back to.
    """
    if not isinstance(given, Mapping):
        raise ConfigMistake(f"the context of a run is {given!r}: give a mapping of settings.")
    settings = read_settings(None, {**given, "keep_checkpoints": "all"})
    first = first_event("started", thread, settings)
    place = folder / usual_path(settings).name
    return RunWriter(thread, settings, lambda: RunFolder.unused(place, settings), first, begun=False)


def go_on(
    branches: Sequence[RunFolder], thread: str, checkpoint: str | None, given: Mapping[str, Any], *, session: bool
) -> RunWriter:
    """The search of a thread, after that checkpoint or its newest, in the same folder or in a fork of it.

    `session` tells a run of the graph from a change of its state. Of the settings only `CHANGEABLE`
    may be `given` anew; raises `ThreadMistake` for others, and `RunMistake` when another process
    is writing there.
    """
    ends = {folder: tip.checkpoint for folder in branches if (tip := tip_of(folder))}
    newest = max(ends, key=ends.__getitem__)
    if checkpoint is None:
        folder, checkpoint = newest, ends[newest]
    else:
        holding = [each for each in ends if holds(each, checkpoint)]
        if not holding:
            raise ThreadMistake(f"thread {thread} has no checkpoint {checkpoint}: take one of its history.")
        folder = next((each for each in holding if ends[each] == checkpoint), holding[0])
    settings = _with(given, folder)
    first = first_event("resumed", thread, settings, folder.events()) if session else None
    if ends[folder] == checkpoint and not folder.has_ended():
        writer = RunWriter(thread, settings, lambda: folder, first, begun=True)
        writer.folder()
        return writer
    return RunWriter(thread, settings, lambda: fork(folder, checkpoint), first, begun=True)


def _with(given: Mapping[str, Any], folder: RunFolder) -> Settings:
    """The settings of a run, with what is given of the changeable; raises `ThreadMistake`."""
    settings, asked = folder.settings(), read_settings(None, given)
    changed = {name: getattr(asked, name) for name in CHANGEABLE & given.keys()}
    for name, field in Settings.model_fields.items():
        value, own = getattr(asked, name), getattr(settings, name)
        if name not in changed and value not in (field.get_default(call_default_factory=True), own):
            raise ThreadMistake(
                f"{name} = {value!r} is not that of {folder.name}, where it is {own!r} for good: leave it out, or "
                "start a new thread."
            )
    return settings.model_copy(update=changed)
