"""What the report and the page draw: Plotly figures of a search that has ended, or of one as far as it has come."""

from __future__ import annotations

import operator
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from graphs.state import TEMPLATES, Candidate
from tap_agent.runs.result import History, NetworkRecord
from tap_eval.allocation.size import packed_size
from tap_eval.proxies.proxy import Failure
from tap_eval.quantization.sums import Ranged

COLORS = {"initialization": "#4c78a8", "mutation": "#f58518", "crossover": "#54a24b", "refinement": "#b279a2"}
ACCENT, GREY, INK = "#c2185b", "#9aa5b1", "#1f2933"


@dataclass(frozen=True)
class Section:
    """A figure with its words; `name` tells it from the others of a page."""

    name: str
    title: str
    caption: str
    figure: go.Figure


def searching(history: History) -> list[Section]:
    """How the search goes, generation by generation."""
    return [
        Section(
            "fitness",
            "Fitness by generation",
            "Eq. 6 of every candidate that lived; the line is the best so far.",
            fitness(history),
        ),
        Section(
            "probabilities",
            "Template probabilities",
            "With which the offspring of each generation were drawn.",
            probabilities(history),
        ),
        Section(
            "deaths",
            "Proposals that died",
            "Share of each generation; code that does not run (the paper's Table 12) apart from duplicates.",
            deaths(history),
        ),
    ]


def fitness(history: History) -> go.Figure:
    """Every living candidate by generation and template, and the best so far."""
    figure = go.Figure()
    for template in TEMPLATES:
        living = [each for each in history.candidates if each.template == template and each.fitness is not None]
        figure.add_scatter(
            x=[each.generation for each in living],
            y=[each.fitness for each in living],
            mode="markers",
            name=template,
            marker={"color": COLORS[template], "size": 9, "opacity": 0.75},
            ids=[each.name for each in living],
            hovertemplate="%{id}: %{y:.4f}<extra></extra>",
        )
    best: list[float | None] = []
    for generation in history.generations:
        so_far = [value for value in (*best[-1:], generation.best) if value is not None]
        best.append(max(so_far, default=None))
    figure.add_scatter(
        x=[generation.index for generation in history.generations],
        y=best,
        mode="lines",
        name="best so far",
        line={"color": ACCENT, "width": 2, "shape": "hv"},
    )
    return styled(figure, "generation", "fitness", whole_x=True)


def probabilities(history: History) -> go.Figure:
    """The distribution that each generation was drawn from, stacked."""
    figure = go.Figure()
    for template in TEMPLATES:
        figure.add_bar(
            x=[generation.index for generation in history.generations],
            y=[generation.probabilities[template] for generation in history.generations],
            name=template,
            marker_color=COLORS[template],
            hovertemplate="%{y:.0%}",
        )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return styled(figure, "generation", "probability", whole_x=True)


def deaths(history: History) -> go.Figure:
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
            for generation in history.generations
        ]
        figure.add_bar(
            x=[generation.index for generation in history.generations],
            y=shares,
            name=group,
            marker_color=color,
            hovertemplate="%{y:.0%}",
        )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return styled(figure, "generation", "share of proposals", whole_x=True)


SYMBOLS = ["circle", "square", "triangle-up", "x", "star", "hexagon", "cross"]
"""of baselines"""


def kib(candidate: Candidate, index: int, network: NetworkRecord) -> float:
    """Size of `network`, which is at `index`, packed with the candidate's bits, in KiB; of its weights if old."""
    bits = candidate.allocations[index]
    if not network.sized_whole:
        return sum(map(operator.mul, (layer.params for layer in network.layers), bits.means())) / 8 / 1024
    in_float = sum(network.in_float_bytes.values())
    sums = Ranged(network.sums, network.sums_of_inputs)
    return packed_size(network.layers, bits.allocation(), in_float, sums).total / 1024


def family(history: History, chosen: str | None = None) -> go.Figure:
    """The ancestors of the best proxy and of what conversations made, generation by generation.

    Those of a chosen one too, and its descendants.
    """
    wanted = [history.best, *(each.name for each in history.refinements), *_descendants(history, chosen)]
    members = _ancestors(history, [name for name in wanted if name])
    columns: dict[int, list[Candidate]] = {}
    for member in members:
        columns.setdefault(member.generation, []).append(member)
    place = {
        member.name: (generation, (row + 0.5 + _shift(generation)) / len(column))
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
    rings = {history.best: ACCENT} | ({chosen: INK} if chosen != history.best else {})
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
                "line": {
                    "width": [3 if member.name in rings else 0 for member in shown],
                    "color": [rings.get(member.name, ACCENT) for member in shown],
                },
            },
            text=[f"{member.name}<br>{_fitness_text(member)}" for member in shown],
            textposition="bottom center",
            ids=[member.name for member in shown],
            customdata=["<br>".join(_wrapped(member.thought)) for member in shown],
            hovertemplate="%{customdata}<extra></extra>",
        )
    tallest = max(map(len, columns.values()), default=1)
    figure = styled(figure, "generation", "", whole_x=True, height=max(280, 80 + 90 * tallest))
    figure.update_yaxes(visible=False, range=[0, 1])
    return figure


def _shift(generation: int) -> float:
    """Of a column of the family tree, in rows: no two alike, so that no line runs through a proxy in between."""
    return 0.5 * (generation * 0.618 % 1 - 0.5)


def _fitness_text(candidate: Candidate) -> str:
    return "" if candidate.fitness is None else f"{candidate.fitness:.3f}"


def _descendants(history: History, name: str | None) -> list[str]:
    """The named proxy, if any, and those that descend from it."""
    found = [name] if name else []
    for each in sorted(history.everyone, key=lambda each: each.generation):
        if set(each.parents) & set(found) and not each.failure:
            found.append(each.name)
    return found


def _ancestors(history: History, names: Sequence[str]) -> list[Candidate]:
    """The named proxies and everyone they descend from, by name."""
    found: dict[str, Candidate] = {}
    waiting = list(names)
    while waiting:
        member = history.candidate(waiting.pop())
        if member.name not in found:
            found[member.name] = member
            waiting += member.parents
    return [found[name] for name in sorted(found)]


def _wrapped(text: str, width: int = 70) -> list[str]:
    return textwrap.wrap(text.replace("<", "&lt;"), width) or [""]


def styled(figure: go.Figure, x: str, y: str, *, whole_x: bool = False, height: int = 340) -> go.Figure:
    """The figure with the look that all share; `x` and `y` name its axes, `height` is in pixels."""
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
        last = max((place for trace in figure.data for place in trace.x or () if place is not None), default=0)
        figure.update_xaxes(dtick=1, range=[-0.5, last + 0.5])
    return figure
