"""What every agent of a run is told: one page of contract, arithmetic, formulas, baselines and layers.

It is the same text for every call of a run, so that servers which keep the beginnings of prompts read it once.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prompts import render
from tap_eval.allocation.score import REACH
from tap_eval.baselines.baselines import baselines
from tap_eval.measuring.bench import Bench
from tap_eval.preparing.layers import Layer
from tap_eval.proxies.features import TASK, visible
from tap_eval.proxies.fitness import FitnessWeights
from tools.sandbox import published

MOST_LINES = 60
"""of a network's table of layers; where there are more layers, those of a block share a line"""
_COLUMNS = ("weight_l2", "weight_kurtosis", "input_trace", "input_rank", "activation_std", "activation_power")
"""statistics in the table of layers"""


def briefing(benches: Sequence[Bench], fitness: FitnessWeights, allowance: int, seed: int) -> str:
    """The page for agents on `benches` that may measure `allowance` proxies.

    The baselines of `seed`, which the final table has too, are measured for it on the search split.
    """
    task = benches[0].task
    return render(
        "system",
        sandbox=published(),
        features=visible(task.inputs),
        task=TASK,
        groups=task.choices.channel_groups,
        timed=task.budget.unit == "s",
        reach=REACH,
        levels=_listed([f"{2**bits - 1} levels at {bits} bits" for bits in sorted(task.choices.weights)]),
        lowest=min(task.choices.weights),
        activations=_listed([str(bits) for bits in sorted(task.choices.activations)]),
        rounding=task.rounding,
        calibrated=len(benches[0].splits.calibrations[0]),
        sums=any(bench.rounds_sums for bench in benches),
        alpha=fitness.alpha,
        beta=fitness.beta,
        gamma=fitness.gamma,
        worth=fitness.worth,
        networks=[_network(bench, benches[:place], seed) for place, bench in enumerate(benches)],
        allowance=f"{allowance} proxy" if allowance == 1 else f"{allowance} proxies",
    )


def _network(bench: Bench, before: Sequence[Bench], seed: int) -> dict[str, Any]:
    """One of the benchmark set; the table of its layers stands where the network comes `before` at another budget."""
    full = bench.searched(None)
    rows = [{"label": "full precision", "top1": full.top1, "kl": full.kl}]
    for each in baselines(bench, seed, left_out=lambda _: None):
        found = [bench.searched(allocation) for allocation in each.allocations]
        row = {name: statistics.mean(getattr(one, name) for one in found) for name in ("top1", "kl")}
        rows.append({"label": f"{each.label} ({each.note})" if each.note else each.label, **row})
    groups = blocks(bench.layers)
    same = [other.name for other in before if other.prepared is bench.prepared]
    return {
        "name": bench.name,
        "limited": bench.task.budget.about,
        "count": full.count,
        "baselines": rows,
        "blocks": len(groups) < len(bench.layers),
        "same": same[0] if same else "",
        "table": "" if same else _table(groups, bench.features),
        **bench.described_task,
    }


def blocks(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers that share a line: each has its own, or, of more than `MOST_LINES`, those of the smallest modules that
    give no more lines than that."""
    if len(layers) <= MOST_LINES:
        return [[layer] for layer in layers]
    deepest = max(layer.block.count(".") for layer in layers) + 1
    for depth in range(deepest, -1, -1):
        found = [list(of) for _, of in itertools.groupby(layers, key=_module(depth))]
        if len(found) <= MOST_LINES:
            break
    return found


def _module(depth: int) -> Callable[[Layer], list[str]]:
    return lambda layer: layer.block.split(".")[:depth]


def _table(groups: Sequence[Sequence[Layer]], features: Sequence[Mapping[str, Any]]) -> str:
    statistics_ = [name for name in _COLUMNS if name in features[0]]
    lowest = sorted(features[0].get("rounding_error", {}), key=int)[:1]
    noise = [f"noise at {bits} bits" for bits in lowest]
    heads = ["#", "layer", "kind", "in > out", "kernel", "stride", "size", "params", "Mmacs", *statistics_, *noise]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for layers in groups:
        first, last = layers[0], layers[-1]
        cells = [
            str(first.index) if first is last else f"{first.index} to {last.index}",
            first.name if first is last else first.block or "(all)",
            ", ".join(dict.fromkeys(layer.kind for layer in layers)),
            f"{first.in_channels} > {last.out_channels}",
            _span([layer.kernel for layer in layers]),
            _span([layer.stride for layer in layers]),
            _span([layer.output_size if layer.tokens == 1 else layer.tokens for layer in layers]),
            str(sum(layer.params for layer in layers)),
            f"{sum(layer.macs for layer in layers) / 1e6:.3g}",
            *(_span([features[layer.index][name] for layer in layers]) for name in statistics_),
            *(_span([_noise(features[layer.index], bits) for layer in layers]) for bits in lowest),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _noise(of: Mapping[str, Any], bits: str) -> float:
    """What rounding to the nearest of `bits` adds to a layer's output, relative to its variance."""
    variance = sum(std**2 for std in of["channels"]["activation_std"])
    return sum(of["rounding_error"][bits]) / variance if variance else 0.0


def _span(values: Sequence[Any]) -> str:
    """One number, or the least and the greatest."""
    return " to ".join(dict.fromkeys(f"{value:.3g}" for value in (min(values), max(values))))


def _listed(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
