"""A table of many runs in the terminal."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tap_agent.report.lines import Grid, grid, over_text, overview
from tap_agent.tables.line import Line
from tap_agent.tables.plan import Plan
from tap_agent.terminal.bar import Bar
from tap_agent.terminal.console import cell, out, plain

_LEAST_WIDTH, _HEAD_WIDTH, _WORDS_WIDTH = 22, 9, 14
"""letters of a row's name at least, and most of a line of a head and of words, where a single word is not longer"""


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


def print_lines(plan: Plan, lines: Sequence[Line]) -> None:
    """Prints the table; where the terminal is too narrow for its figures lines are longer, and nothing is cut off."""
    table = lines_table(plan, lines)
    least = out.measure(table, options=out.options.update(max_width=sys.maxsize)).minimum
    Console(emoji=False, width=max(out.width, least)).print(table)


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
    for place, head in enumerate(found.words[named:], named):
        table.add_column(cell(head), overflow="fold", width=_width(head, [row.words[place] for row in found.rows]))
    for place, head in enumerate(found.figures):
        title = "\n".join(textwrap.wrap(head, _HEAD_WIDTH))
        lines = [line for text in (title, *(row.figures[place] for row in found.rows)) for line in text.split("\n")]
        table.add_column(cell(title), justify="right", width=max(map(cell_len, lines)))
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


def _width(head: str, cells: Sequence[str]) -> int:
    """Of a column of words: as narrow as its longest word, or as wide as all of them, up to a bound."""
    words = [word for text in (head, *cells) for word in text.split()]
    return max(max(map(cell_len, words)), min(max(map(cell_len, (head, *cells))), _WORDS_WIDTH))
