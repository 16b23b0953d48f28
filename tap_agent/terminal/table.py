"""A table of many runs in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tap_agent.report.lines import grid, over_text
from tap_agent.tables.line import Line
from tap_agent.tables.plan import Plan
from tap_agent.terminal.bar import Bar
from tap_agent.terminal.console import cell, out, plain


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
    """The table with what is to be known of its rows."""
    found = grid(lines, plan.shows)
    table = Table(title=cell(plan.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("row")
    for head in found.words:
        table.add_column(head, overflow="fold")
    for head in found.figures:
        table.add_column(head.replace(" (", "\n("), justify="right")
    networks = [line.network for line in lines]
    for place, row in enumerate(found.rows):
        if place and networks[place] != networks[place - 1]:
            table.add_section()
        notes = "".join(f"\n[dim]{cell(note)}[/dim]" for note in row.notes)
        mark = f" [dim][{row.footnote}][/dim]" if row.footnote else ""
        style = {"proxy": "bold", "search": "bold", "cited": "italic"}.get(row.kind, "")
        table.add_row(f"{cell(row.label)}{mark}{notes}", *map(cell, (*row.words, *row.figures)), style=style)
    below = [Text(text) for text in (plan.about, over_text(lines)) if text]
    below += [Text(f"[{number}] {text}") for number, text in enumerate(found.footnotes, 1)]
    return Group(table, *below)
