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
from tap_eval.baselines.uniform import rule_of

_CITED = "cited"
_LEAST = 5
"""values over which a mean and a spread are to be"""
_COMPARED = ("top1", "kl")
"""what an overview has of each budget"""
_WORDS = {"network": "network", "budget": "budget", "variant": "varied", "bits": "W/A", "sees": "sees"}
"""of a line, with their heads"""
_ACROSS = ("budget", "variant")
"""what an overview may have a column for each of"""


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
    caption: str = ""
    """what a cell holds, where it holds several figures"""


def grid(lines: Sequence[Line], shows: tuple[str, ...] = ()) -> Grid:
    """The grid of lines, with the quantities of `shows`, or all."""
    names = [name for name in ordered(list(lines), shows) if name != "bops" or name in shows]
    words = {head: [getattr(line, name) for line in lines] for name, head in _WORDS.items()}
    kept = {head: cells for head, cells in words.items() if any(cells)}
    footnotes = list(dict.fromkeys(note for line in lines if (note := _footnote(line))))
    rows = [
        Cells(
            kind=line.kind,
            label=f"{line.row} ({_CITED})" if line.kind == "cited" else line.row,
            words=tuple(cells[place] for cells in kept.values()),
            figures=tuple(figure_text(name, line.figures.get(name)) for name in names),
            notes=tuple(filter(None, [line.reference, *line.note.split("; ")])),
            footnote=footnotes.index(_footnote(line)) + 1 if _footnote(line) else 0,
        )
        for place, line in enumerate(lines)
    ]
    return Grid(tuple(kept), tuple(column(name).title for name in names), tuple(rows), tuple(footnotes))


def overview(lines: Sequence[Line]) -> Grid | None:
    """A row for each rule that gave bits, a column for each budget, or for each variant where the budget is one.

    None where there are not several of either.
    """
    own = [line for line in lines if line.figures and line.kind not in (_CITED, "search")]
    names = [name for name in _COMPARED if any(name in line.figures for line in own)]
    given = {name: list(dict.fromkeys(filter(None, (getattr(line, name) for line in own)))) for name in _ACROSS}
    across, other = _ACROSS if len(given["budget"]) > 1 else reversed(_ACROSS)
    heads = given[across]
    if not names or len(heads) < 2:
        return None
    rows: dict[tuple[str, ...], dict[str, Line]] = {}
    for line in own:
        under = rows.setdefault((line.network, rule_of(line.row), getattr(line, other), line.sees, line.kind), {})
        under.update(dict.fromkeys([getattr(line, across)] if getattr(line, across) else heads, line))
    titles = {"network": 0, _WORDS[other]: 2, "sees": 3}
    kept = {title: place for title, place in titles.items() if any(key[place] for key in rows)}
    cells = [
        Cells(
            kind=key[-1],
            label=key[1],
            words=tuple(key[place] for place in kept.values()),
            figures=tuple(_compared(under[head], names) if head in under else "" for head in heads),
            notes=(),
            footnote=0,
        )
        for key, under in rows.items()
    ]
    caption = f"{', '.join(column(name).title for name in names)}:"
    return Grid(tuple(kept), tuple(heads), tuple(cells), (), caption)


def _compared(line: Line, names: Sequence[str]) -> str:
    """With the bits of a row that has the same in all layers, which may be fewer than the budget allows."""
    bits = line.row.removeprefix("uniform ") if rule_of(line.row) != line.row else ""
    return "\n".join(filter(None, [bits, *(figure_text(name, line.figures.get(name)) for name in names)]))


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
    out = [f"# {plan.title}", "", *([plan.about, ""] if plan.about else [])]
    if short := overview(lines):
        out += [short.caption, "", *_rows(short), "", "In full:", ""]
    out += _rows(found)
    if over := over_text(lines):
        out += ["", over]
    out += ["", *(f"{number}. {text}" for number, text in enumerate(found.footnotes, 1))]
    return "\n".join(out) + "\n"


def _rows(found: Grid) -> list[str]:
    """Lines of Markdown."""
    noted = any(row.notes or row.footnote for row in found.rows)
    heads = ["row", *found.words, *found.figures, *(["notes"] if noted else [])]
    out = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in found.rows:
        note = "; ".join([*row.notes, *([f"[{row.footnote}]"] if row.footnote else [])])
        cells = row.label, *row.words, *row.figures, *([note] if noted else [])
        out.append(f"| {' | '.join(map(_escaped, cells))} |")
    return out


def _escaped(cell: str) -> str:
    for letter in "\\|*_<":
        cell = cell.replace(letter, f"\\{letter}")
    return " ".join(cell.replace("\n", ", ").split())


def page(plan: Plan, lines: Sequence[Line]) -> str:
    """The table as one HTML file, with a figure for each network of which accuracies were measured."""
    networks = dict.fromkeys(line.network for line in lines if line.kind != _CITED and "top1" in line.figures)
    drawn = {name: drawing([line for line in lines if line.network == name]) for name in networks}
    options = {"full_html": False, "include_plotlyjs": False, "config": {"displayModeBar": False, "responsive": True}}
    return template("lines").render(
        plan=plan,
        grid=grid(lines, plan.shows),
        overview=overview(lines),
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
    for row in dict.fromkeys((line.kind, rule_of(line.row), line.variant if not searched else "") for line in lines):
        kind, rule, variant = row
        its = [
            line
            for line in lines
            if (line.kind, rule_of(line.row), line.variant if not searched else "") == row
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
