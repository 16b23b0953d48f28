"""What a person sees in the terminal when a command has ended: tables, and results in words."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from tap_agent.report.text import (
    chosen_text,
    draws_text,
    found_text,
    head_of_test,
    in_float_text,
    kl_text,
    sizes_text,
    summary,
    top1_text,
)
from tap_agent.runs.folder import RunFolder
from tap_agent.runs.progress import overview
from tap_agent.runs.result import Result, Row

_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # a pipe has none of its own
out = Console(emoji=False, soft_wrap=True, width=_WIDTH)
err = Console(emoji=False, stderr=True, soft_wrap=True)


def plain(text: str) -> str:
    """Without control characters but tabs and ends of lines: what others wrote must not steer the terminal."""
    return "".join(letter for letter in text if letter in "\t\n" or unicodedata.category(letter) not in ("Cc", "Cf"))


def cell(text: str) -> str:
    """Text for a table, in which it is no markup either."""
    return escape(plain(text))


def show_result(folder: RunFolder, result: Result) -> None:
    """Prints what a run has come to."""
    best = result.candidate(result.best)
    out.print(results_table(result.table, [result.networks[place].budget for place in result.shown]), soft_wrap=False)
    proxy = folder.path / "proxies" / f"{best.name}.py"
    out.print(f"best proxy {best.name}, fitness {best.value:.4f}: {proxy}", markup=False)
    if chosen := chosen_text(result):
        out.print(chosen, soft_wrap=False)
    out.print(summary(result), soft_wrap=False)
    for file in result.files:
        out.print(f"model: {folder.path / file.name} ({file.size_bytes / 1024:,.1f} KiB)", markup=False)
    for sentence in result.left_out:
        out.print(f"left out: {sentence}", markup=False)
    for sentence in result.unwritten:
        out.print(f"there is no {sentence}", markup=False)
    out.print(f"report: {folder.report}", markup=False)


def results_table(rows: Sequence[Row], budgets: Iterable[str]) -> Table:
    """The final table, one line a row; with bit operations where a budget is one of those.

    Where rows were allocated at several budgets, each names its own, and the order is that of the budgets.
    """
    operations = any(budget.lower().endswith("bops") for budget in budgets)
    timed = any(row.latency_ms is not None for row in rows)
    table = Table(
        title="Top-1 accuracy", title_justify="left", caption=cell(sizes_text(rows)) or None, caption_justify="left"
    )
    networks = len({row.network for row in rows}) > 1
    several = len({(row.network, row.budget) for row in rows if row.budget}) > len({row.network for row in rows})
    if networks:
        table.add_column("network")
    if several:
        table.add_column("budget", justify="right")
    draws = max(len(row.draws) for row in rows)
    searched = any(row.search for row in rows)
    left = any(row.in_float for row in rows)
    middle = [
        *(["in float32"] if left else []), *(["GBOPs"] if operations else []), *(["ms"] if timed else []),
        *(["search"] if searched else []),
    ]  # fmt: skip
    head, counted = head_of_test(rows)
    plain = any(row.unfinished for row in rows)
    last = [*(["unfinished"] if plain else []), *([f"test, {draws} calibration draws"] if draws > 1 else [])]
    for name in ("allocation from", "bits", "KiB", *middle, head, "KL", *last):
        justify: JustifyMethod = "left" if name == "allocation from" else "right"
        table.add_column(name, justify=justify, overflow="fold")  # no figure is cut off in a narrow terminal
    for before, row in zip([None, *rows[:-1]], rows, strict=True):
        if several and before and (before.network, before.budget) != (row.network, row.budget):
            table.add_section()
        note = "".join(f"\n[dim]{cell(line)}[/dim]" for line in (row.note, found_text(row)) if line)
        cells = [f"{cell(row.label)}{note}", f"{row.bits:.2f}", f"{row.size_bytes / 1024:,.1f}"]
        if left:
            cells.append(in_float_text(row.in_float))
        if operations:
            cells.append(f"{row.bops / 1e9:.3g}")
        if timed:
            cells.append("" if row.latency_ms is None else f"{row.latency_ms:.3g}")
        if searched:
            cells.append(f"{100 * row.search.top1:.1f}" if row.search else "")
        cells += [top1_text(row.test, count=counted), kl_text(row.test)]
        if plain:
            cells.append(f"{100 * row.unfinished.top1:.1f}" if row.unfinished else "")
        if draws > 1:
            cells.append(draws_text(row))
        first = [*([cell(row.network)] if networks else []), *([cell(row.budget)] if several else [])]
        table.add_row(*first, *cells, style="bold" if row.kind == "proxy" else "")
    return table


def runs_table(runs: Sequence[RunFolder]) -> Table:
    """One line a run: what it is, how far it has come, and what it achieved."""
    table = Table()
    table.add_column("run", no_wrap=True, min_width=max((len(run.name) for run in runs), default=0))  # to be copied
    for name in ("network", "budget", "state", "fitness", "test"):
        table.add_column(name, overflow="fold")
    for found in map(overview, runs):
        state = cell(found.note) or found.state
        if found.state in ("running", "interrupted"):
            state += f", {found.done} of {found.of} generations"
        fitness = f"{found.fitness:.4f}" if found.fitness is not None else ""
        tests = ", ".join(f"{100 * test:.1f} %" for test in found.tests)
        table.add_row(cell(found.name), cell(found.networks), cell(found.budget), state, fitness, tests)
    return table
