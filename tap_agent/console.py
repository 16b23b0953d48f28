"""What a person sees in the terminal: progress while it works, tables when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from graphs.state import TEMPLATES
from tap_agent.course import glance
from tap_agent.folder import RunFolder
from tap_agent.result import MeasuredTop1, Result, Row
from tap_agent.settings import Settings

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


class Display(AbstractContextManager["Display"]):
    """A progress bar over the candidates of a search, and a line for each generation."""

    def __init__(self, settings: Settings, before: Sequence[dict[str, Any]] = ()) -> None:
        """`before` are the events of the run's earlier sessions."""
        self._settings = settings
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=out,
        )
        self._seen = {event["name"] for event in before if event["event"] == "judged"}
        total = settings.population * (settings.generations + 1)
        self._task = self._progress.add_task("preparing", total=total, completed=len(self._seen))

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Shows what `event` says."""
        if text := doing(event):
            self._describe(text)
        match event["event"]:
            case "prepared":
                for note in event["notes"]:
                    self._progress.console.print(note)
            case "proposed":
                self._seen.add(event["name"])
                self._progress.update(self._task, completed=len(self._seen))
            case "generation":
                self._progress.console.print(generation_line(event))
            case "measuring the table":
                self._progress.remove_task(self._task)
                self._task = self._progress.add_task(doing(event), total=None)
            case "table row":
                self._progress.advance(self._task)
            case _:
                pass

    def _describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)


def doing(event: dict[str, Any]) -> str:
    """What goes on after an event, in a few words, where the event says it."""
    match event["event"]:
        case "preparing":
            return f"measuring the layer errors of {event['network']}"
        case "proposed":
            died = f" died: {event['failure']}" if event["failure"] else ""
            return f"generation {event['generation']}: {event['template']} {event['name']}{died}"
        case "measuring the table":
            return "measuring the table on the test split"
        case _:
            return ""


def generation_line(event: dict[str, Any]) -> str:
    """One generation in a line."""
    died = sum(event["failures"].values())
    causes = ", ".join(f"{count} {failure}" for failure, count in event["failures"].items())
    share = ", ".join(f"{template} {event['probabilities'][template]:.0%}" for template in TEMPLATES)
    best = "none lived" if event["best"] is None else f"best {event['best']:.4f}, mean {event['mean']:.4f}"
    return f"generation {event['index']}: fitness {best}{f'; died: {causes}' if died else ''}  [dim]({share})[/dim]"


def results_table(rows: Sequence[Row]) -> Table:
    """The final table, one line a row."""
    table = Table(title="Top-1 accuracy within the budget", title_justify="left")
    networks = len({row.network for row in rows}) > 1
    if networks:
        table.add_column("network")
    draws = max(len(row.draws) for row in rows)
    searched = any(row.search for row in rows)
    for name in ("allocation from", "bits", "KiB", *(["search"] if searched else []), "test (95 % interval)"):
        table.add_column(name, justify="left" if name == "allocation from" else "right")
    table.add_column(f"test, {draws} calibration draws", justify="right")
    for row in rows:
        note = f"\n[dim]{row.note}[/dim]" if row.note else ""
        cells = [f"{row.label}{note}", f"{row.bits:.2f}", f"{row.size_bytes / 1024:,.1f}"]
        if searched:
            cells.append(f"{100 * row.search.top1:.1f}" if row.search else "")
        cells += [top1_text(row.test), draws_text(row)]
        table.add_row(*([row.network] if networks else []), *cells, style="bold" if row.kind == "proxy" else "")
    return table


def runs_table(runs: Sequence[RunFolder]) -> Table:
    """One line a run: what it is, how far it has come, and what it achieved."""
    table = Table()
    for name in ("run", "network", "budget", "state", "fitness", "test"):
        table.add_column(name)
    for found in map(glance, runs):
        state = found.note or found.state
        if found.state in ("running", "interrupted"):
            state += f", {found.done} of {found.of} generations"
        fitness = f"{found.fitness:.4f}" if found.fitness is not None else ""
        tests = ", ".join(f"{100 * test:.1f} %" for test in found.tests)
        table.add_row(found.name, found.networks, found.budget, state, fitness, tests)
    return table


def top1_text(found: MeasuredTop1) -> str:
    """Per cent with interval and count."""
    return f"{100 * found.top1:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f}, n = {found.count:,})"


def draws_text(row: Row) -> str:
    """Mean and standard deviation over calibration draws, in per cent."""
    if len(row.draws) < 2:
        return ""
    return f"{100 * sum(row.draws) / len(row.draws):.1f} ± {100 * row.spread:.1f}"


def summary(result: Result) -> str:
    """What happened, in a line."""
    living = [candidate for candidate in result.candidates if candidate.failure is None]
    whole = max((sum(candidate.images) for candidate in living), default=0) * len(living)
    share = sum(sum(candidate.images) for candidate in living) / (whole or 1)
    raced = f" measured on {share:.0%} of the images" if share < 1 else ""
    return (
        f"{len(result.candidates)} proposals, {len(living)} distinct and alive{raced}; "
        f"{result.measured} measurements; {result.tokens:,} tokens; {result.seconds:.0f} s"
    )
