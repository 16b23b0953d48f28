"""A bar that says what goes on, what is done and what is left."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Self

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tap_agent.terminal.console import out


def tell(progress: Progress, what: str, done: int, of: int) -> None:
    """Shows on a line of its own that `done` of so many steps of `what` are done, until all are."""
    text = escape(what)
    found = next((task.id for task in progress.tasks if task.description == text), None)
    if found is None:
        found = progress.add_task(text, total=of)
    progress.update(found, completed=done, total=of)
    if done >= of:
        progress.remove_task(found)


class Bar(AbstractContextManager["Bar"]):
    """Shows one thing after another; gone when it is left. Where the output is no terminal, nothing is shown."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=out,
            transient=True,
            disable=not (out.is_interactive and out.file.isatty()),
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def watch(self, what: str, done: int, of: int) -> None:
        """Of something beside it, `done` of so many steps are done; it is gone with the last."""
        tell(self._progress, what, done, of)

    def begin(self, doing: str, of: int | None = None) -> None:
        """Something begins, that has `of` steps; None where it has none, or they are not known."""
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(escape(doing), total=of)

    def advance(self) -> None:
        """A step is done."""
        self._progress.advance(self._task)
