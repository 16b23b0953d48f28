"""The tools that an agent may call: run code in the sandbox, and measure within its allowance."""

from __future__ import annotations

import json
from collections.abc import Sequence

from langchain_core.tools import BaseTool, tool

from tap_eval.measuring.bench import Bench
from tap_eval.proxies.proxy import Rejection
from tools.evaluation import Scored, measure, score
from tools.sandbox import Sandbox


def make_tools(benches: Sequence[Bench], sandbox: Sandbox, allowance: int) -> list[BaseTool]:
    """Tools for one agent; `measure` answers `allowance` times. They return text and never raise for bad code."""
    left = allowance

    @tool
    def run_code(code: str) -> str:
        """Runs a proxy on every layer of every network; shows its scores and the bits that follow, or its error."""
        scored = score(code, benches, sandbox)
        return refusal(scored) if isinstance(scored, Rejection) else _table(scored, benches)

    @tool("measure")
    def measure_code(code: str) -> str:
        """Runs a proxy, quantizes the networks with its bits, measures their accuracy; counts towards the allowance."""
        nonlocal left
        if left < 1:
            return "Your allowance of measurements is used up: submit your proposal."
        scored = score(code, benches, sandbox)
        if isinstance(scored, Rejection):
            return refusal(scored)
        left -= 1
        found = measure(scored, benches)
        lines = [
            f"{bench.name}: accuracy {top1:.4f}, KL divergence from full precision {kl:.4f} nats, "
            f"rank correlation with the layer errors {rho:.3f}"
            for bench, top1, kl, rho in zip(benches, found.top1, found.kl, found.rho, strict=True)
        ]
        return "\n".join([*lines, f"{left} measurements left.", _table(scored, benches)])

    return [run_code, measure_code]


def layer_table(bench: Bench, scored: Scored, place: int, before: Scored | None = None) -> str:
    """Markdown, a line a layer of the network at `place`: score and bits, beside those of `before`."""
    heads = ["#", "layer", "kind", "weights", "score", "bits", *(["score before", "bits before"] if before else [])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for layer in bench.layers:
        cells = [str(layer.index), layer.name, layer.kind, f"{layer.params:,}"]
        for each in (scored, before):
            if each:
                bits = each.allocations[place].weights[layer.index]
                mean = bits if isinstance(bits, int) else sum(bits) / len(bits)
                cells += [f"{each.scores[place][layer.index]:.4g}", f"{mean:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def refusal(rejection: Rejection) -> str:
    """A failure as a sentence."""
    return f"{rejection.failure}: {rejection.message}"


def _table(scored: Scored, benches: Sequence[Bench]) -> str:
    return "\n".join(
        json.dumps(
            {
                "network": bench.name,
                "scores": [float(f"{value:.4g}") for value in scores],
                "bits": [
                    bits if isinstance(bits, int) else round(sum(bits) / len(bits), 2) for bits in allocation.weights
                ],
            }
        )
        for bench, scores, allocation in zip(benches, scored.scores, scored.allocations, strict=True)
    )
