"""The report: one HTML file that holds everything it needs, made from a `Result` alone."""

from __future__ import annotations

import operator
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from graphs.state import TEMPLATES, Candidate
from tap_agent.console import draws_text, summary, top1_text
from tap_agent.result import NetworkRecord, Result, Row
from tap_eval.proxy import Failure

COLORS = {"initialization": "#4c78a8", "mutation": "#f58518", "crossover": "#54a24b", "refinement": "#b279a2"}
ACCENT, GREY, INK = "#c2185b", "#9aa5b1", "#1f2933"
KINDS = {"conv": "#4c78a8", "depthwise": "#72b7b2", "linear": "#b279a2", "attention": "#eeca3b"}


def render(result: Result) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("tap_agent", "."),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    best = result.candidate(result.best)
    sections: list[tuple[str, str, go.Figure]] = [
        ("Fitness by generation", "Eq. 6 of every candidate that lived; the line is the best so far.", fitness(result)),
        ("Template probabilities", "With which the offspring of each generation were drawn.", probabilities(result)),
        (
            "Proposals that died",
            "Share of each generation; code that does not run (the paper's Table 12) apart from duplicates.",
            deaths(result),
        ),
    ]
    for index, network in enumerate(result.networks):
        rows = [row for row in result.table if row.network == network.name]
        sections += [
            (
                f"Accuracy against size: {network.name}",
                f"Test split, 95 % intervals; budget {network.budget}. Small dots: candidates, on the search split.",
                accuracy(result, index, rows),
            ),
            (
                f"Bits a layer: {network.name}",
                "Above: the bits that the best proxy led to. Below: its scores, and what quantizing each layer alone "
                "to the lowest bits costs, which the proxy could not see.",
                allocation(network, best, index),
            ),
        ]
    sections.append(("Family tree of the best proxy", "Point at a proxy to read its thought.", family(result)))
    return environment.get_template("report.html.jinja").render(
        result=result,
        best=best,
        rows=[(row, top1_text(row.test), draws_text(row)) for row in result.table],
        several=len(result.networks) > 1,
        draws=max(len(row.draws) for row in result.table),
        summary=summary(result),
        headline=[_headline(result, network) for network in result.networks],
        sections=[(title, caption, _html(figure)) for title, caption, figure in sections],
        plotly=get_plotlyjs(),
    )


def _headline(result: Result, network: NetworkRecord) -> dict[str, Any]:
    rows = {row.kind: row for row in reversed(result.table) if row.network == network.name}
    proxy, full = rows["proxy"], rows["full precision"]
    return {
        "network": network.name,
        "images": network.images if ":" not in network.images else Path(network.images).name,
        "top1": top1_text(proxy.test),
        "full": f"{100 * full.test.top1:.1f}",
        "size": f"{proxy.size_bytes / 1024:,.1f} KiB",
        "bits": f"{proxy.bits:.2f}",
        "smaller": f"{100 * (1 - proxy.size_bytes / full.size_bytes):.1f}",
    }


def fitness(result: Result) -> go.Figure:
    """Every living candidate by generation and template, and the best so far."""
    figure = go.Figure()
    for template in TEMPLATES:
        living = [each for each in result.candidates if each.template == template and each.fitness is not None]
        figure.add_scatter(
            x=[each.generation for each in living],
            y=[each.fitness for each in living],
            mode="markers",
            name=template,
            marker={"color": COLORS[template], "size": 9, "opacity": 0.75},
            text=[each.name for each in living],
            hovertemplate="%{text}: %{y:.4f}<extra></extra>",
        )
    best: list[float | None] = []
    for generation in result.generations:
        so_far = [value for value in (*best[-1:], generation.best) if value is not None]
        best.append(max(so_far, default=None))
    figure.add_scatter(
        x=[generation.index for generation in result.generations],
        y=best,
        mode="lines",
        name="best so far",
        line={"color": ACCENT, "width": 2, "shape": "hv"},
    )
    return _styled(figure, "generation", "fitness", whole_x=True)


def probabilities(result: Result) -> go.Figure:
    """The distribution that each generation was drawn from, stacked."""
    figure = go.Figure()
    for template in TEMPLATES:
        figure.add_bar(
            x=[generation.index for generation in result.generations],
            y=[generation.probabilities[template] for generation in result.generations],
            name=template,
            marker_color=COLORS[template],
            hovertemplate="%{y:.0%}",
        )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return _styled(figure, "generation", "probability", whole_x=True)


def deaths(result: Result) -> go.Figure:
    """Share of a generation's offspring that died, by whether their code ran."""
    figure = go.Figure()
    groups = {"does not run": ACCENT, "duplicate": GREY}
    for group, color in groups.items():
        shares = [
            sum(
                count
                for failure, count in generation.failures.items()
                if (failure == Failure.DUPLICATE) == (group == "duplicate")
            )
            / max(sum(generation.offspring.values()), 1)
            for generation in result.generations
        ]
        figure.add_bar(
            x=[generation.index for generation in result.generations],
            y=shares,
            name=group,
            marker_color=color,
            hovertemplate="%{y:.0%}",
        )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return _styled(figure, "generation", "share of proposals", whole_x=True)


def accuracy(result: Result, index: int, rows: Sequence[Row]) -> go.Figure:
    """Test accuracy of the table's rows over their size; candidates as dots."""
    figure = go.Figure()
    quantized = [row for row in rows if row.kind != "full precision"]
    layers = result.networks[index].layers
    living = [each for each in (*result.candidates, *result.refinements) if each.fitness is not None]
    figure.add_scatter(
        x=[_kib(each, index, [layer.params for layer in layers]) for each in living],
        y=[100 * each.top1[index] for each in living],
        mode="markers",
        name="candidates (search split)",
        marker={"color": GREY, "size": 5, "opacity": 0.6},
        text=[each.name for each in living],
        hovertemplate="%{text}: %{y:.1f} %<extra></extra>",
    )
    symbols = ["circle", "square", "triangle-up", "x", "star", "hexagon", "cross"]
    for place, row in enumerate(quantized):
        figure.add_scatter(
            x=[row.size_bytes / 1024],
            y=[100 * row.test.top1],
            error_y={
                "type": "data",
                "array": [100 * (row.test.high - row.test.top1)],
                "arrayminus": [100 * (row.test.top1 - row.test.low)],
                "thickness": 1,
            },
            mode="markers",
            name=row.label,
            marker={
                "size": 13 if row.kind == "proxy" else 10,
                "symbol": "diamond" if row.kind == "proxy" else symbols[place % len(symbols)],
                "color": ACCENT if row.kind == "proxy" else None,
            },
            hovertemplate=f"{row.label}: %{{y:.1f}} %, %{{x:,.1f}} KiB<extra></extra>",
        )
    full = next(row for row in rows if row.kind == "full precision")
    figure.add_hline(
        y=100 * full.test.top1,
        line={"dash": "dot", "color": INK, "width": 1},
        annotation_text=f"full precision, {full.size_bytes / 1024:,.0f} KiB",
        annotation_position="bottom left",
    )
    return _styled(figure, "size of the weights (KiB)", "top-1 (%)", height=440)


def _kib(candidate: Candidate, index: int, params: Sequence[int]) -> float:
    return sum(map(operator.mul, params, candidate.allocations[index].means())) / 8 / 1024


def allocation(network: NetworkRecord, best: Candidate, index: int) -> go.Figure:
    """Bits a layer over the layer's error and score."""
    names = [layer.name for layer in network.layers]
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, specs=[[{}], [{"secondary_y": True}]]
    )
    bits = best.allocations[index].means()
    for kind, color in KINDS.items():
        chosen = [place for place, layer in enumerate(network.layers) if layer.kind == kind]
        if chosen:
            figure.add_bar(
                x=[names[place] for place in chosen],
                y=[bits[place] for place in chosen],
                text=[f"{bits[place]:.2g}" for place in chosen],
                textposition="inside",
                name=kind,
                marker_color=color,
                customdata=[network.layers[place].params for place in chosen],
                hovertemplate="%{x}: %{y:.2f} bits, %{customdata:,} weights<extra></extra>",
                row=1,
                col=1,
            )
    figure.add_scatter(
        x=names,
        y=network.layer_errors,
        name="layer error (nats)",
        mode="lines+markers",
        line={"color": INK, "width": 1.5},
        hovertemplate="%{x}: %{y:.4f} nats<extra></extra>",
        row=2,
        col=1,
    )
    figure.add_scatter(
        x=names,
        y=best.scores[index],
        name=f"score of {best.name}",
        mode="lines+markers",
        line={"color": ACCENT, "width": 1.5},
        hovertemplate="%{x}: %{y:.4g}<extra></extra>",
        row=2,
        col=1,
        secondary_y=True,
    )
    figure.update_xaxes(categoryorder="array", categoryarray=names, tickangle=-60, tickfont={"size": 10}, row=2, col=1)
    figure = _styled(figure, "", "", height=560)
    figure.update_yaxes(title_text="weight bits", row=1, col=1)
    figure.update_yaxes(title_text="layer error (nats)", row=2, col=1, secondary_y=False)
    figure.update_yaxes(title_text="score", showgrid=False, row=2, col=1, secondary_y=True)
    return figure


def family(result: Result) -> go.Figure:
    """The ancestors of the best proxy and of what conversations made, generation by generation."""
    members = _ancestors(result, [result.best, *(each.name for each in result.refinements)])
    columns: dict[int, list[Candidate]] = {}
    for member in members:
        columns.setdefault(member.generation, []).append(member)
    place = {
        member.name: (generation, (row + 0.5) / len(column))
        for generation, column in columns.items()
        for row, member in enumerate(column)
    }
    figure = go.Figure()
    ends: dict[str, list[float | None]] = {"x": [], "y": []}
    for member in members:
        for parent in member.parents:
            ends["x"] += [place[parent][0], place[member.name][0], None]
            ends["y"] += [place[parent][1], place[member.name][1], None]
    figure.add_scatter(**ends, mode="lines", line={"color": GREY, "width": 1.5}, hoverinfo="skip", showlegend=False)
    for template in COLORS:
        shown = [member for member in members if member.template == template]
        if not shown:
            continue
        figure.add_scatter(
            x=[place[member.name][0] for member in shown],
            y=[place[member.name][1] for member in shown],
            mode="markers+text",
            name=template,
            marker={
                "color": COLORS[template],
                "size": 16,
                "line": {"width": [3 if member.name == result.best else 0 for member in shown], "color": ACCENT},
            },
            text=[f"{member.name}<br>{member.value:.3f}" for member in shown],
            textposition="bottom center",
            customdata=["<br>".join(_wrapped(member.thought)) for member in shown],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure = _styled(figure, "generation", "", whole_x=True, height=max(280, 80 + 90 * max(map(len, columns.values()))))
    figure.update_yaxes(visible=False, range=[0, 1])
    return figure


def _ancestors(result: Result, names: Sequence[str]) -> list[Candidate]:
    """The named proxies and everyone they descend from, by name."""
    found: dict[str, Candidate] = {}
    waiting = list(names)
    while waiting:
        member = result.candidate(waiting.pop())
        if member.name not in found:
            found[member.name] = member
            waiting += member.parents
    return [found[name] for name in sorted(found)]


def _wrapped(text: str, width: int = 70) -> list[str]:
    return textwrap.wrap(text.replace("<", "&lt;"), width) or [""]


def _styled(figure: go.Figure, x: str, y: str, *, whole_x: bool = False, height: int = 340) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 16, "b": 50},
        legend={"orientation": "h", "yref": "container", "y": 1, "yanchor": "top", "x": 0},
        font={"family": "system-ui, sans-serif", "color": INK, "size": 13},
    )
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    if whole_x:
        figure.update_xaxes(dtick=1)
    return figure


def _html(figure: go.Figure) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
