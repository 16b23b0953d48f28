"""A table of many runs in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tap_agent.report.lines import Grid, grid, over_text, overview
from tap_agent.tables.line import Line
from tap_agent.tables.plan import Plan
from tap_agent.terminal.bar import Bar
from tap_agent.terminal.console import cell, out, plain

_LEAST_WIDTH, _HEAD_WIDTH = 22, 9
"""letters of a row's name, and most of a head's line where words allow it"""


class TableBar(Bar):
    """A bar that says what a table is at; where the output is no terminal, in a line each."""

    def begin(self, doing: str, of: int | None = None) -> None:
        """Something begins; see `Bar`."""
        super().begin(doing, of)
        if not out.is_terminal:
            out.print(plain(doing), markup=False)

    def tell(self, note: str) -> None:
        """Prints something to know of a network or its images."""
        out.print(plain(note), markup=False)


def lines_table(plan: Plan, lines: Sequence[Line]) -> RenderableType:
    """The table, network by network, below it by number what is to be known of its rows, and its overview last."""
    found = grid(lines, plan.shows)
    notes = list(dict.fromkeys([*found.footnotes, *(note for row in found.rows for note in row.notes)]))
    below = [Text(text) for text in (plan.about, over_text(lines)) if text]
    below += [Text(f"[{number}] {plain(text)}") for number, text in enumerate(notes, 1)]
    short = overview(lines)
    return Group(
        _drawn(plan.title, found, notes), *below, *([_drawn(f"\n{short.caption}", short, [])] if short else [])
    )


def _drawn(title: str, found: Grid, notes: Sequence[str]) -> Table:
    table = Table(title=cell(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("row", min_width=_LEAST_WIDTH)
    named = found.words[:1] == ("network",)
    for head in found.words[named:]:
        table.add_column(head)
    for head in found.figures:
        table.add_column("\n".join(textwrap.wrap(head, _HEAD_WIDTH)), justify="right", no_wrap=True)
    before = None
    for row in found.rows:
        if named and (network := row.words[0]) != before:
            table.add_section()
            table.add_row(f"[underline]{cell(network or 'network not named')}[/underline]")
            before = network
        known = sorted({notes.index(note) + 1 for note in row.notes} | ({row.footnote} - {0}))
        mark = f" [dim][{', '.join(map(str, known))}][/dim]" if known else ""
        style = {"proxy": "bold", "search": "bold", "cited": "italic"}.get(row.kind, "")
        table.add_row(f"{cell(row.label)}{mark}", *map(cell, (*row.words[named:], *row.figures)), style=style)
    return table
