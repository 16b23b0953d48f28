"""Accuracy against size at several budgets: a line for each rule, with the intervals of its points."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from tap_agent.report import figures
from tap_agent.report.figures import ACCENT, SYMBOLS, Section, styled
from tap_agent.runs.result import History, Row

CAPTION = "Top-1 on the test split, with 95 % intervals."


def sizes(history: History, index: int) -> Section:
    """Accuracy against size of one network: at several budgets where they were measured, else at that of the run."""
    network = history.networks[index]
    own = figures.sizes(history, index)
    if not any(row.network == network.name for row in history.curve):
        return own
    figure = curve(
        [row for row in (*history.table, *history.curve) if row.network == network.name], network.sized_whole
    )
    figures.add_candidates(figure, history, index, small=True)
    caption = (
        f"{CAPTION} Lines: bits allocated anew at each budget, by the same proxy, evenly and by measured layer error. "
        f"Single points: the other rows of the table, at the budget of the run, {network.budget}. Small dots: "
        "candidates, on the search split, but for those far below."
    )
    return Section(own.name, own.title, caption, figure)


def curve(rows: Sequence[Row], whole: bool = True) -> go.Figure:
    """Test accuracy of one network's rows over their size; those of one rule are joined, full precision is a line.

    Sizes are of the `whole` packed network, or of the weights alone.
    """
    figure = go.Figure()
    series: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.kind != "full precision":
            series.setdefault((row.kind, _rule(row)), []).append(row)
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
    lowest = min(row.test.low for row in rows)
    highest = max(row.test.high for row in rows)
    for full in (row for row in rows if row.kind == "full precision"):
        figures.add_full_precision(figure, full)
    margin = 0.06 * (highest - lowest) + 0.002
    figure.update_yaxes(range=[100 * max(lowest - margin, 0), 100 * (highest + margin)])
    return styled(figure, f"size of the {'packed network' if whole else 'weights'} (KiB)", "top-1 (%)", height=440)


def _rule(row: Row) -> str:
    """What a row was allocated by, whatever the budget."""
    return "uniform bits" if row.label.startswith("uniform W") else row.label
