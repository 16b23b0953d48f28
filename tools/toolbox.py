"""The tools that an agent may call: run code in the sandbox, measure within its allowance, look at features."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from langchain_core.tools import BaseTool, tool

from tap_eval.measuring.bench import Bench
from tap_eval.proxies.proxy import Rejection
from tap_eval.quantization.quantizer import LayerBits
from tools.evaluation import Measured, Scored, measure, score
from tools.sandbox import Sandbox

TEN_SECONDS = 1e12
"""multiply-accumulates that a CPU core does in about ten seconds where it multiplies bytes: 2,000 images of ResNet-20,
8e10, took it 0.8 s"""
MOST_SHOWN = 6
"""layers whose features are shown at a time"""
_QUARTILES = (0, 0.25, 0.5, 0.75, 1)


@dataclass(frozen=True)
class Draft:
    """A proxy that an agent has measured."""

    thought: str
    code: str
    scored: Scored


def allowance_for(benches: Sequence[Bench]) -> int:
    """Measurements that an agent may ask for, of networks that take about so long to be measured.

    It follows from their sizes and not from a clock, so that a run is told the same when it is resumed or repeated.
    """
    work = sum(layer.macs * bench.compared for bench in benches for layer in bench.layers)
    return 3 if work < TEN_SECONDS else 1


def make_tools(
    benches: Sequence[Bench],
    sandbox: Sandbox,
    allowance: int,
    parents: Mapping[str, Measured] | None = None,
    drafts: list[Draft] | None = None,
) -> list[BaseTool]:
    """Tools for one agent; `measure` answers `allowance` times, with what its `parents` achieve beside.

    They return text and never raise for bad code. What is measured is added to `drafts`. Which call is still answered
    depends on their order: an agent is to make them one after another.
    """
    left = allowance

    @tool
    def run_code(code: str) -> str:
        """Runs a proxy on every layer of every network; shows its scores and the bits that follow, or its error.

        Bits such as `2 x 16, 4 x 48` are those of 16 and of 48 of a layer's output channels.
        """
        scored = score(code, benches, sandbox)
        return refusal(scored) if isinstance(scored, Rejection) else _tables(scored, benches)

    @tool("measure")
    def measure_code(code: str, thought: str = "") -> str:
        """Runs a proxy and measures what it achieves by what fitness counts; counts towards the allowance.

        What is measured takes part in the search even if another is submitted; `thought` is kept with it.
        """
        nonlocal left
        if left < 1:
            return "Your allowance of measurements is used up: submit your proposal."
        scored = score(code, benches, sandbox)
        if isinstance(scored, Rejection):
            return refusal(scored)
        left -= 1
        if drafts is not None:
            drafts.append(Draft(thought, code, scored))
        found = [([], measure(scored, benches)), *(([name], each) for name, each in (parents or {}).items())]
        lines = [
            f"{', '.join([bench.name, *of])}: {each.told(place)}"
            for place, bench in enumerate(benches)
            for of, each in found
        ]
        return "\n".join([*lines, f"{left} measurements left.", "", _tables(scored, benches)])

    @tool
    def show_features(layers: list[str]) -> str:
        """Shows all features of some layers, given by their names or indices; those by channel as quartiles."""
        return features_text(benches, layers)

    return [run_code, measure_code, show_features]


def layer_table(bench: Bench, scored: Scored, place: int, before: Scored | None = None) -> str:
    """Markdown, a line a layer of the network at `place`: score and bits, beside those of `before`."""
    heads = ["#", "layer", "kind", "weights", "score", "bits", *(["score before", "bits before"] if before else [])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for layer in bench.layers:
        cells = [str(layer.index), layer.name, layer.kind, f"{layer.params:,}"]
        for each in (scored, before):
            if each:
                bits = each.allocations[place].weights[layer.index]
                cells += [f"{each.scores[place][layer.index]:.4g}", bits_text(bits)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def features_text(benches: Sequence[Bench], layers: Sequence[str]) -> str:
    """All features of the named layers, as JSON, or which names there are; no more than `MOST_SHOWN` layers."""
    asked = {str(layer).strip() for layer in layers}
    found = [
        {"network": bench.name} | {name: _short(value) for name, value in features.items()}
        for place, bench in enumerate(benches)
        if all(bench.prepared is not other.prepared for other in benches[:place])
        for features in bench.features
        if asked & {features["name"], str(features["index"])}
    ]
    if not found:
        names = ", ".join(dict.fromkeys(layer.name for bench in benches for layer in bench.layers))
        return f"there is no layer {', '.join(sorted(asked))}; the layers are {names}."
    more = f"{len(found) - MOST_SHOWN} more were left out: ask for fewer." if len(found) > MOST_SHOWN else ""
    return "\n".join([*map(json.dumps, found[:MOST_SHOWN]), *filter(None, [more])])


def _short(value: Any) -> Any:
    """Rounded; of values by channel the least, the quartiles and the greatest."""
    if isinstance(value, dict):
        return {name: _short([float(each) for each in np.quantile(of, _QUARTILES)]) for name, of in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def refusal(rejection: Rejection) -> str:
    """A failure as a sentence."""
    return f"{rejection.failure}: {rejection.message}"


def bits_text(bits: LayerBits) -> str:
    """Bits of a layer, as 4, or of its output channels with how many have them, as 2 x 16, 4 x 48."""
    if isinstance(bits, int):
        return str(bits)
    return ", ".join(f"{each} x {count}" for each, count in sorted(Counter(bits).items()))


def _tables(scored: Scored, benches: Sequence[Bench]) -> str:
    """Of every network."""
    return "\n\n".join(f"{bench.name}\n\n{layer_table(bench, scored, place)}" for place, bench in enumerate(benches))
