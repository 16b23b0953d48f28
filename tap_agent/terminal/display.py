"""What a running search shows: a live table in a terminal, and a plain line an event where there is none."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from graphs.state import TEMPLATES, by_proposal
from tap_agent.settings.model import Settings
from tap_agent.terminal.bar import tell
from tap_agent.terminal.console import out

Event = Mapping[str, Any]
_LINES_BESIDE = 8
"""of a terminal, that the table leaves to the progress and to what scrolled by"""
_WIDE = 100
_CANDIDATE = ("name", "generation", "template", "seconds", "tokens")
_SHOWN: dict[str, tuple[str, ...]] = {
    "proposed": (*_CANDIDATE, "failure", "message", "notes"),
    "judged": (*_CANDIDATE, "fitness", "accuracy", "kl", "foretelling", "dropped", "failure", "message"),
    "chosen": ("best",),
    "reflected": ("generation", "seconds", "tokens"),
    "generation": ("index", "best", "mean", *TEMPLATES, "died"),
}
"""what the line of an event says, in this order; of other events, everything but `_UNTOLD`"""
_UNTOLD = {"event", "thread", "measured", "elapsed", "record", "content", "given", "settings"}


class Display(Protocol):
    """Shows the events of a search, between its start and its end."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, event: Event) -> None:
        """Shows what `event` says."""
        ...


def make_display(settings: Settings, before: Sequence[Event] = ()) -> Display:
    """The display for where the output goes; `before` are the events of the run's earlier sessions."""
    told = {(event["event"], event.get("name", event.get("index"))): event for event in before}  # crashes repeat some
    before = [event for event in told.values() if event["event"] in ("proposed", "judged", "generation")]
    return LiveTable(settings, before) if out.is_interactive and out.file.isatty() else Lines(before)


class Lines(AbstractContextManager["Lines"]):
    """A line an event that has something to tell: its name, then `key=value` in a fixed order; see `event_line`."""

    def __init__(self, before: Sequence[Event] = ()) -> None:
        self._ended = [event for event in before if event["event"] == "generation"]

    def __exit__(self, *_: object) -> None:
        """Nothing is left to put away."""

    def __call__(self, event: Event) -> None:
        if event["event"] == "resumed":
            for generation in self._ended:
                typer.echo(event_line(generation))
        line = event_line(event) if event["event"] != "working" else ""
        if line.partition(" ")[2]:
            typer.echo(line)


def event_line(event: Event) -> str:
    """An event as a line without control characters, values with spaces in double quotes; the unknown is left out."""
    means = {"accuracy": _mean(event, "top1"), **{name: _mean(event, name) for name in ("kl", "foretelling")}}
    facts = {**event, **means, **event.get("probabilities", {})}
    facts["died"] = _causes(event.get("failures", {}))
    names = _SHOWN.get(event["event"]) or [name for name in event if name not in _UNTOLD]
    found = {name: _value(facts.get(name)) for name in names}
    return " ".join([event["event"].replace(" ", "-"), *(f"{name}={value}" for name, value in found.items() if value)])


def _value(value: object) -> str:
    """`value` as a word, or nothing for nothing."""
    if value is None or isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4f}"
    text = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


class LiveTable(AbstractContextManager["LiveTable"]):
    """The candidates of the latest generation above a progress bar; generations that ended scroll by as lines."""

    def __init__(self, settings: Settings, before: Sequence[Event] = ()) -> None:
        self._population = settings.population
        self._last = settings.generations
        self._rows: dict[str, Event] = {}
        self._seen: set[str] = set()
        self._noting = threading.Lock()
        self._before = before
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._progress.add_task("preparing", total=self._population * (self._last + 1))
        self._live = Live(console=out, get_renderable=self._screen, refresh_per_second=8, transient=True)

    def __enter__(self) -> LiveTable:
        self._live.start()
        for event in self._before:
            self(event)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        match event["event"]:
            case "preparing":
                for note in event["notes"]:
                    self._live.console.print(note, markup=False, soft_wrap=False)
                self._describe(f"measuring the layer errors of {event['network']}")
            case "proposed":
                for note in event.get("notes", ()):
                    self._live.console.print(note, markup=False, soft_wrap=False)
                self._note(event)
                self._seen |= set() if event.get("draft_of") else {event["name"]}
                proposed = sum(not row.get("draft_of") for row in self._rows.values())
                doing = "measuring" if proposed == self._population else "proposing"
                self._describe(f"generation {event['generation']} of {self._last}: {doing}")
            case "judged":
                self._note(event)
            case "generation":
                self._live.refresh()  # however fast it went, all that was judged is seen once
                self._live.console.print(generation_line(event), highlight=False, soft_wrap=False)
                if event["index"] < self._last:
                    self._describe(f"generation {event['index'] + 1} of {self._last}: proposing")
            case "choosing":
                self._describe(f"choosing among the best {event['finalists']}")
            case "measuring the table":
                self._rows = {}
                self._progress.remove_task(self._task)
                self._task = self._progress.add_task("measuring the table on the test split", total=None)
            case "measuring the curve":
                self._progress.remove_task(self._task)
                self._task = self._progress.add_task("measuring accuracy against size", total=event["points"])
            case "working":
                tell(self._progress, event["what"], event["done"], event["of"])
            case "not written" | "left out":
                self._live.console.print(event["why"], markup=False, soft_wrap=False)
            case "table row" | "curve point":
                self._progress.advance(self._task)
            case _:
                pass

    def _note(self, event: Event) -> None:
        """Events come from several threads, and the screen is drawn by another, so a row is never changed in place."""
        with self._noting:
            rows = {name: row for name, row in self._rows.items() if row["generation"] == event["generation"]}
            self._rows = {**rows, event["name"]: {**rows.get(event["name"], {}), **event}}

    def _describe(self, text: str) -> None:
        self._progress.update(self._task, description=escape(text), completed=len(self._seen))

    def _screen(self) -> RenderableType:
        if not self._rows:
            return self._progress
        return Group(candidates_table(list(self._rows.values()), out.height - _LINES_BESIDE), self._progress)


def candidates_table(events: Sequence[Event], most: int) -> Table:
    """A line a candidate, from what was proposed and, once it is known, what it was judged to be worth.

    Of more than `most` the last are shown, and how many there are above them.
    """
    padding = (0, 1 if out.width >= _WIDE else 0, 0, 0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding, show_edge=False, expand=True)
    for name in ("generation", "template", "candidate"):
        table.add_column(name, no_wrap=True, min_width=max(map(len, TEMPLATES)) if name == "template" else None)
    for name in ("fitness", "accuracy", "KL", "seconds", "tokens"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
    shown = sorted(events, key=lambda event: by_proposal(event["name"]))
    left_out = max(len(shown) - max(most, 1), 0)
    best = max((event["fitness"] for event in shown if event.get("fitness") is not None), default=None)
    for event in shown[left_out:]:
        fitness, accuracy, kl = event.get("fitness"), _mean(event, "top1"), _mean(event, "kl")
        table.add_row(
            str(event["generation"]),
            event["template"],
            event["name"],
            "" if fitness is None else f"{fitness:.4f}",
            "" if accuracy is None else f"{100 * accuracy:.1f}",
            "" if kl is None else f"{kl:.3f}",
            f"{event['seconds']:.1f}",
            f"{event['tokens']:,}",
            _remark(event),
            style="dim" if event["failure"] else "bold" if fitness is not None and fitness == best else "",
        )
    if left_out:
        table.caption = f"and {left_out} before these"
    return table


def _remark(event: Event) -> str:
    """Why a candidate died, or when it was dropped."""
    if event["failure"]:
        return f"[red]{event['failure']}[/red]" + (f": {escape(event['message'])}" if event.get("message") else "")
    return f"[yellow]dropped[/yellow] after {sum(event['images']):,} images" if event.get("dropped") else ""


def _mean(event: Event, of: str) -> float | None:
    """Over networks, of what was measured on the search split."""
    values = event.get(of)
    return sum(values) / len(values) if values else None


def generation_line(event: Event) -> str:
    """One generation in a line of Rich markup."""
    died = _causes(event["failures"])
    share = ", ".join(f"{template} {event['probabilities'][template]:.0%}" for template in TEMPLATES)
    best = "none lived" if event["best"] is None else f"best {event['best']:.4f}, mean {event['mean']:.4f}"
    return f"generation {event['index']}: fitness {best}{f'; died: {died}' if died else ''}  [dim]({share})[/dim]"


def _causes(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {failure}" for failure, count in failures.items())
