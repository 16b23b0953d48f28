"""Lines of a table as text: a grid that the terminal, Markdown and HTML show, with how each was measured below it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tap_agent.report.figures import ACCENT, GREY, SYMBOLS, styled
from tap_agent.report.html import template
from tap_agent.tables.line import Figure, Line, column, ordered
from tap_agent.tables.plan import Plan

_CITED = "cited"
_LEAST = 5
"""values over which a mean and a spread are to be"""


@dataclass(frozen=True)
class Cells:
    """A line of a grid."""

    kind: str
    label: str
    words: tuple[str, ...]
    """network, budget and so on"""
    figures: tuple[str, ...]
    notes: tuple[str, ...]
    """what is to be known of the row"""
    footnote: int
    """number of `Grid.footnotes`, from 1; 0 for none"""


@dataclass(frozen=True)
class Grid:
    """A table as text; a column that no line has is left out."""

    words: tuple[str, ...]
    """heads of the columns of words, after that of the row's label"""
    figures: tuple[str, ...]
    """heads of the columns of figures"""
    rows: tuple[Cells, ...]
    footnotes: tuple[str, ...]
    """how rows were measured, or where they stand"""


def grid(lines: Sequence[Line], shows: tuple[str, ...] = ()) -> Grid:
    """The grid of lines, with the quantities of `shows`, or all."""
    names = [name for name in ordered(list(lines), shows) if name != "bops" or name in shows]
    words = {
        head: [getattr(line, name) for line in lines]
        for name, head in (("network", "network"), ("budget", "budget"), ("variant", "varied"), ("bits", "W/A"))
    }
    kept = {head: cells for head, cells in words.items() if any(cells)}
    footnotes = list(dict.fromkeys(note for line in lines if (note := _footnote(line))))
    rows = [
        Cells(
            kind=line.kind,
            label=f"{line.row} ({_CITED})" if line.kind == "cited" else line.row,
            words=tuple(cells[place] for cells in kept.values()),
            figures=tuple(figure_text(name, line.figures.get(name)) for name in names),
            notes=tuple(
                filter(None, [line.reference, f"sees {line.sees}" if line.sees else "", *line.note.split("; ")])
            ),
            footnote=footnotes.index(_footnote(line)) + 1 if _footnote(line) else 0,
        )
        for place, line in enumerate(lines)
    ]
    return Grid(tuple(kept), tuple(column(name).title for name in names), tuple(rows), tuple(footnotes))


def _footnote(line: Line) -> str:
    """How it was measured, or where it is cited from."""
    return ". ".join(filter(None, [f"Cited: {line.source}" if line.kind == "cited" else "", line.protocol]))


def figure_text(name: str, figure: Figure | None) -> str:
    """Mean and standard deviation; "" where there is none."""
    if figure is None:
        return ""
    form = column(name).form
    spread = "" if figure.spread is None else f" ± {figure.spread:{form.lstrip('+')}}"
    return f"{figure.mean:{form}}{spread}"


def over_text(lines: Sequence[Line]) -> str:
    """Over how many draws or seeds the spreads are, in a sentence; "" where there is no spread."""
    counts = {len(each.values) for line in lines if line.kind != _CITED for each in line.figures.values()} - {1}
    if not counts:
        return ""
    few = ", fewer than a spread deserves" if min(counts) < _LEAST else ""
    between = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"± is one standard deviation over {between} draws or seeds{few}."


def markdown(plan: Plan, lines: Sequence[Line]) -> str:
    """The table as Markdown."""
    found = grid(lines, plan.shows)
    heads = ["row", *found.words, *found.figures, "notes"]
    out = [f"# {plan.title}", "", *([plan.about, ""] if plan.about else [])]
    out += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in found.rows:
        note = "; ".join([*row.notes, *([f"[{row.footnote}]"] if row.footnote else [])])
        out.append(f"| {' | '.join(_escaped(cell) for cell in (row.label, *row.words, *row.figures, note))} |")
    if over := over_text(lines):
        out += ["", over]
    out += ["", *(f"{number}. {text}" for number, text in enumerate(found.footnotes, 1))]
    return "\n".join(out) + "\n"


def _escaped(cell: str) -> str:
    for letter in "\\|*_<":
        cell = cell.replace(letter, f"\\{letter}")
    return " ".join(cell.split())


def page(plan: Plan, lines: Sequence[Line]) -> str:
    """The table as one HTML file, with a figure for each network of which accuracies were measured."""
    networks = dict.fromkeys(line.network for line in lines if line.kind != _CITED and "top1" in line.figures)
    drawn = {name: drawing([line for line in lines if line.network == name]) for name in networks}
    options = {"full_html": False, "include_plotlyjs": False, "config": {"displayModeBar": False, "responsive": True}}
    return template("lines").render(
        plan=plan,
        grid=grid(lines, plan.shows),
        over=over_text(lines),
        sections=[(name, figure.to_html(**options)) for name, figure in drawn.items()],
        plotly=get_plotlyjs(),
    )


def drawing(lines: Sequence[Line]) -> go.Figure:
    """Top-1 of one network's lines over size, or over what varies in searches, with one standard deviation.

    Cited figures are grey, those without a size left out.
    """
    figure = go.Figure()
    searched = any(line.kind == "search" for line in lines)
    symbols = itertools.cycle(SYMBOLS)
    for row in dict.fromkeys((line.kind, _rule(line), line.variant if not searched else "") for line in lines):
        kind, rule, variant = row
        its = [
            line
            for line in lines
            if (line.kind, _rule(line), line.variant if not searched else "") == row
            and "top1" in line.figures
            and (searched or "size" in line.figures)
            and (kind != _CITED or not searched or line.variant)
        ]
        if not its:
            continue
        if not searched:
            its.sort(key=lambda line: line.figures["size"].mean)
        color = {"proxy": ACCENT, "search": ACCENT, "cited": GREY, "full precision": "#1f2933"}.get(kind)
        figure.add_scatter(
            x=[line.variant or line.row if searched else line.figures["size"].mean for line in its],
            y=[line.figures["top1"].mean for line in its],
            error_y={"type": "data", "array": [line.figures["top1"].spread or 0.0 for line in its], "thickness": 1},
            mode="markers" if kind == _CITED or searched or len(its) < 2 else "lines+markers",
            name=" ".join(filter(None, [rule, variant, f"({_CITED})" if kind == _CITED else ""])),
            marker={"size": 8, "symbol": next(symbols), "color": color},
            line={"color": color},
        )
    figure.update_xaxes(type="category" if searched else "log")
    return styled(figure, "" if searched else "size (MiB)", "top-1 (%)", height=460)


def _rule(line: Line) -> str:
    """What its bits were allocated by, whatever the budget."""
    return "uniform bits" if line.row.startswith("uniform W") else line.row
