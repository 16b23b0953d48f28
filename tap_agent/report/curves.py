"""Accuracy against size: the points of each rule with their intervals, joined where there are several budgets."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from tap_agent.report.figures import ACCENT, GREY, INK, SYMBOLS, Section, kib, styled
from tap_agent.report.text import budget_text
from tap_agent.runs.result import History, Row
from tap_eval.baselines.uniform import rule_of

CAPTION = "Top-1 on the test split, with 95 % intervals."
_LINES = (
    "Lines: bits allocated anew at each budget, by the same proxy, evenly and by measured layer error. Single points: "
    "the other rows of the table, at the budget of the run, "
)
_DOTS = "Small dots: candidates, on the search split, but for those far below."


def sizes(history: History, index: int) -> Section:
    """Accuracy against size of one network, once there are any rows; and candidates as dots."""
    network = history.networks[index]
    table, measured_anew = (
        [row for row in rows if row.network == network.name] for rows in (history.table, history.curve)
    )
    figure = curve([*table, *measured_anew], network.sized_whole)
    _add_candidates(figure, history, index, small=bool(table))
    budget = budget_text(network)
    caption = f"{CAPTION} {_LINES if measured_anew else 'Budget '}{budget}. {_DOTS}"
    if not table:
        caption = f"Candidates, on the search split; budget {budget}."
    return Section(f"accuracy-{index}", f"Accuracy against size: {network.name}", caption, figure)


def curve(rows: Sequence[Row], whole: bool = True) -> go.Figure:
    """Test accuracy of one network's rows over their size; those of one rule are joined, full precision is a line.

    Sizes are of the `whole` packed network, or of the weights alone.
    """
    figure = go.Figure()
    series: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.kind != "full precision":
            series.setdefault((row.kind, rule_of(row.label)), []).append(row)
    baselines = 0
    for (kind, rule), members in series.items():
        points = sorted(members, key=lambda row: row.size_bytes)
        proxy = kind == "proxy"
        figure.add_scatter(
            x=[row.size_bytes / 1024 for row in points],
            y=[100 * row.test.top1 for row in points],
            error_y={
                "type": "data",
                "array": [100 * (row.test.high - row.test.top1) for row in points],
                "arrayminus": [100 * (row.test.top1 - row.test.low) for row in points],
                "thickness": 1,
            },
            mode="lines+markers" if len(points) > 1 else "markers",
            name=rule if len({row.label for row in points}) > 1 else points[0].label,
            line={"color": ACCENT if proxy else None, "width": 2.5 if proxy else 1.5},
            marker={"size": 11 if proxy else 8, "symbol": "diamond" if proxy else SYMBOLS[baselines % len(SYMBOLS)]},
            customdata=[[row.label, row.budget, 100 * row.test.low, 100 * row.test.high] for row in points],
            hovertemplate="%{customdata[0]} %{customdata[1]}: %{y:.1f} % (%{customdata[2]:.1f} to %{customdata[3]:.1f})"
            ", %{x:,.1f} KiB<extra></extra>",
        )
        baselines += not proxy
    for full in (row for row in rows if row.kind == "full precision"):
        figure.add_hline(
            y=100 * full.test.top1,
            line={"dash": "dot", "color": INK, "width": 1},
            annotation_text=f"full precision, {full.size_bytes / 1024:,.0f} KiB",
            annotation_position="top left",
        )
    if rows:
        lowest, highest = min(row.test.low for row in rows), max(row.test.high for row in rows)
        margin = 0.06 * (highest - lowest) + 0.002
        figure.update_yaxes(range=[100 * max(lowest - margin, 0), 100 * (highest + margin)])
    return styled(figure, f"size of the {'packed network' if whole else 'weights'} (KiB)", "top-1 (%)", height=440)


def _add_candidates(figure: go.Figure, history: History, index: int, *, small: bool) -> None:
    """Draws a dot for every candidate that was measured, at its size and its accuracy on the search split."""
    living = [each for each in (*history.candidates, *history.refinements) if each.top1]
    figure.add_scatter(
        x=[kib(each, index, history.networks[index]) for each in living],
        y=[100 * each.top1[index] for each in living],
        mode="markers",
        name="candidates (search split)",
        marker={"color": GREY, "size": 5, "opacity": 0.6} if small else {"color": ACCENT, "size": 9, "opacity": 0.6},
        ids=[each.name for each in living],
        hovertemplate="%{id}: %{y:.1f} %<extra></extra>",
    )
