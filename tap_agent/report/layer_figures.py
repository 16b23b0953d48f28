"""What a proxy makes of each layer of a network: figures of bits over scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from graphs.state import Candidate
from tap_agent.report.figures import ACCENT, GREY, INK, Section, styled
from tap_agent.runs.result import History, NetworkRecord

KINDS = {"conv": "#4c78a8", "depthwise": "#72b7b2", "linear": "#b279a2", "attention": "#eeca3b"}


@dataclass(frozen=True)
class Drawn:
    """What a proxy, or a version of it, makes of one network: average bits and scores of its layers."""

    name: str
    bits: Sequence[float]
    scores: Sequence[float]

    @staticmethod
    def of(candidate: Candidate, index: int) -> Drawn:
        """What a candidate made of the network at `index`."""
        return Drawn(candidate.name, candidate.allocations[index].means(), candidate.scores[index])


def bits(history: History, candidate: Candidate, index: int) -> Section:
    """Bits and scores that one candidate gave to the layers of one network."""
    network = history.networks[index]
    return Section(
        f"bits-{index}",
        f"Bits a layer: {network.name}",
        f"Above: the bits that {candidate.name} led to, by its scores and by the sizes of layers: bits for a large one "
        "cost more. Below: its scores, and what quantizing each layer alone to the lowest bits costs, which the proxy "
        "could not see.",
        allocation(network, Drawn.of(candidate, index)),
    )


def changes(network: NetworkRecord, before: Drawn, now: Drawn, index: int) -> Section:
    """What a version of a proxy changes of one network."""
    return Section(
        f"change-{index}",
        f"What it changes: {network.name}",
        "Above: bits a layer. Below: scores, as shares of the highest.",
        change(network, before, now),
    )


def allocation(network: NetworkRecord, drawn: Drawn) -> go.Figure:
    """Bits a layer over the layer's error and score."""
    figure, names = _by_layer(network)
    for kind, color in KINDS.items():
        chosen = [place for place, layer in enumerate(network.layers) if layer.kind == kind]
        if chosen:
            figure.add_bar(
                x=[names[place] for place in chosen],
                y=[drawn.bits[place] for place in chosen],
                text=[f"{drawn.bits[place]:.2g}" for place in chosen],
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
        y=drawn.scores,
        name=f"score of {drawn.name}",
        mode="lines+markers",
        line={"color": ACCENT, "width": 1.5},
        hovertemplate="%{x}: %{y:.4g}<extra></extra>",
        row=2,
        col=1,
        secondary_y=True,
    )
    figure.update_yaxes(title_text="layer error (nats)", row=2, col=1, secondary_y=False)
    positive = "tozero" if min(drawn.scores) >= 0 else "normal"
    own: dict[str, Any] = {"showgrid": False, "tickmode": "auto", "nticks": 6, "rangemode": positive}
    figure.update_yaxes(title_text="score", row=2, col=1, secondary_y=True, **own)
    return figure


def change(network: NetworkRecord, before: Drawn, now: Drawn) -> go.Figure:
    """Bits and scores a layer, of one version of a proxy beside those of another.

    Scores are shares of each version's highest, since a version has a scale of its own; on a logarithmic axis where all
    are positive.
    """
    figure, names = _by_layer(network)
    for drawn, color, dash in ((before, GREY, "dot"), (now, ACCENT, "solid")):
        highest = max(map(abs, drawn.scores)) or 1.0
        figure.add_bar(
            x=names,
            y=drawn.bits,
            name=drawn.name,
            marker_color=color,
            legendgroup=drawn.name,
            hovertemplate="%{x}: %{y:.2f} bits",
            row=1,
            col=1,
        )
        figure.add_scatter(
            x=names,
            y=[score / highest for score in drawn.scores],
            name=drawn.name,
            mode="lines+markers",
            line={"color": color, "width": 1.5, "dash": dash},
            legendgroup=drawn.name,
            showlegend=False,
            customdata=drawn.scores,
            hovertemplate="%{x}: %{customdata:.4g}",
            row=2,
            col=1,
        )
    figure.update_yaxes(title_text="score / highest", row=2, col=1)
    lowest = min(min(drawn.scores) / (max(drawn.scores) or 1.0) for drawn in (before, now))
    if min(*before.scores, *now.scores) > 0:
        marks = [step / 10**decade for decade in range(math.ceil(-math.log10(lowest)) + 1) for step in (1, 0.5, 0.2)]
        marks = [mark for mark in marks if mark > lowest / 2]
        kept = marks if len(marks) < 8 else marks[::3]
        figure.update_yaxes(type="log", tickvals=kept, ticktext=[f"{mark:g}" for mark in kept], row=2, col=1)
    return figure


def _by_layer(network: NetworkRecord) -> tuple[go.Figure, list[str]]:
    """Two empty plots over the layers, bits above, and the names of the layers."""
    names = [layer.name for layer in network.layers]
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, specs=[[{}], [{"secondary_y": True}]]
    )
    figure.update_xaxes(categoryorder="array", categoryarray=names)
    figure.update_xaxes(tickangle=-60, tickfont={"size": 10}, row=2, col=1)
    figure = styled(figure, "", "", height=560)
    figure.update_yaxes(title_text="weight bits", row=1, col=1)
    return figure, names
