"""What a proxy is worth on the benchmark set: scores, allocations, and measured accuracy.

Each step costs more than the one before, so a candidate dies as early as it can: its code is
read, run once in the sandbox for all layers of all networks, its scores are checked and
compared with those already judged, its allocations likewise; only then is it measured.
"""

from __future__ import annotations

import ast
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget, check_within
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.score import Scores, layer_score
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import key
from tap_eval.mistake import BudgetMistake
from tap_eval.preparing.layers import Layer
from tap_eval.proxies.features import Features
from tap_eval.proxies.fitness import rank_correlation
from tap_eval.proxies.proxy import Failure, Rejection, checked_scores
from tap_eval.quantization.quantizer import Allocation, LayerBits
from tools.sandbox import JSON, Sandbox, forbidden
from tools.syntax import parse

_KEPT = 64
"""pieces of code whose trees are not read again: each is looked at more than once while it is judged"""


@dataclass(frozen=True)
class Scored:
    """A proxy's scores a layer and its allocations, one a network, with the seconds that each step took."""

    scores: tuple[list[float], ...]
    allocations: tuple[Allocation, ...]
    prints: tuple[str, ...]
    """what tells this proxy from others: its syntax tree, its scores, its bits"""
    scoring_seconds: float
    allocation_seconds: float


@dataclass(frozen=True)
class Measured:
    """What a scored proxy achieves, one number a network: rho of Eq. 6, accuracy and divergence on search images.

    Or `foretelling` in place of both, where networks are judged by what was measured before.
    """

    rho: tuple[float, ...]
    top1: tuple[float, ...]
    kl: tuple[float, ...]
    """mean over images, nats"""
    count: int
    seconds: float
    foretelling: tuple[float, ...] = ()

    def told(self, place: int) -> str:
        """In words, of the network at `place`."""
        found = (
            f"foretelling {self.foretelling[place]:.4f}"
            if self.foretelling
            else f"accuracy {self.top1[place]:.4f}, KL divergence from full precision {self.kl[place]:.4f} nats"
        )
        return f"{found}, rank correlation with the layer errors {self.rho[place]:.3f}"


def score(code: str, benches: Sequence[Bench], sandbox: Sandbox, known: Known | None = None) -> Scored | Rejection:
    """Runs `code` on every layer of every network, in one sandbox call, and allocates the bits.

    What gives the same as one that is `known` is rejected, before it is run where it reads the same.
    """
    known = known or Known({})
    if rejection := forbidden(code) or known.same_tree(code):
        return rejection
    own_allocator = "allocate" in functions(code)
    secret = secrets.token_hex(16)  # names that the code cannot know: each network's inputs are its own
    cases: dict[str, JSON] = {
        f"_{secret}_{place}": {"layers": bench.features, "task": bench.described_task, "budget": _budget(bench)}
        for place, bench in enumerate(benches)
    }
    pair = "[sensitivity({0}['layers'], {0}['task'])]"
    if own_allocator:
        pair = "(lambda s: [s, allocate(s, {0}['layers'], {0}['budget'])])(sensitivity({0}['layers'], {0}['task']))"
    started = time.perf_counter()
    returned = sandbox.run(code, f"[{', '.join(map(pair.format, cases))}]", cases)
    scoring_seconds = time.perf_counter() - started
    if isinstance(returned, Rejection):
        return returned
    scores: list[Scores] = []
    allocations: list[Allocation] = []
    started = time.perf_counter()
    for bench, answer in zip(benches, cast("list[list[JSON]]", returned), strict=True):
        groups = bench.task.choices.channel_groups
        checked = checked_scores(answer[0], [layer.out_channels for layer in bench.layers], by_channel=groups > 1)
        if isinstance(checked, Rejection):
            return checked
        scores.append(checked)
        if own_allocator:
            chosen = _own_allocation(answer[1], bench)
            if isinstance(chosen, Rejection):
                return chosen
        else:
            chosen = allocate(checked, bench.layers, bench.task.choices, bench.task.budget)
        allocations.append(chosen)
    scored = Scored(
        tuple([layer_score(score) for score in each] for each in scores),
        tuple(allocations),
        (tree_print(code), *_result_prints(scores, allocations, own_allocator)),
        scoring_seconds,
        time.perf_counter() - started,
    )
    return known.same_result(scored) or scored


def sensitivities(
    code: str, layers: Sequence[Features], task: Features, channels: Sequence[int], sandbox: Sandbox
) -> Scores | Rejection:
    """What `code` scores the layers of one network, whose features are given, with so many output `channels` each."""
    if rejection := forbidden(code):
        return rejection
    returned = sandbox.run(code, "sensitivity(layers, task)", {"layers": layers, "task": task})
    return returned if isinstance(returned, Rejection) else checked_scores(returned, channels, by_channel=True)


def measure(scored: Scored, benches: Sequence[Bench]) -> Measured:
    """What a scored proxy achieves on the search split; whatever was measured before is recalled."""
    started = time.perf_counter()
    rho = tuple(
        rank_correlation(scores, bench.layer_errors) for scores, bench in zip(scored.scores, benches, strict=True)
    )
    if its := foretellings(scored.scores, benches):
        return Measured(rho, (), (), 0, time.perf_counter() - started, tuple(its))
    found = [bench.searched(chosen) for bench, chosen in zip(benches, scored.allocations, strict=True)]
    return Measured(
        rho,
        tuple(accuracy.top1 for accuracy in found),
        tuple(accuracy.kl for accuracy in found),
        sum(accuracy.count for accuracy in found),
        time.perf_counter() - started,
    )


def foretellings(scores: Sequence[Sequence[float]], benches: Sequence[Bench]) -> list[float]:
    """How well scores foretell what was measured before, one number a network; none where they are not judged by it."""
    return [bench.foretelling(its) for its, bench in zip(scores, benches, strict=True) if bench.foretelling]


@dataclass(frozen=True)
class Known:
    """What is already judged, for telling duplicates: `fingerprints`, each with the name of its proxy."""

    names: Mapping[str, str]

    def same_tree(self, code: str) -> Rejection | None:
        """The same syntax tree as another's, whatever its layout and comments; `code` must parse."""
        return self._duplicate(tree_print(code), "code")

    def same_result(self, scored: Scored) -> Rejection | None:
        """The same scores, up to what the allocator does not see, or else the same bits."""
        _, scores, bits = scored.prints
        return self._duplicate(scores, "scores") or self._duplicate(bits, "allocation of bits")

    def _duplicate(self, fingerprint: str, what: str) -> Rejection | None:
        if (name := self.names.get(fingerprint)) is None:
            return None
        return Rejection(
            Failure.DUPLICATE, f"it gives the same {what} as {name}, which is already judged; propose one that differs."
        )


@lru_cache(_KEPT)
def tree_print(code: str) -> str:
    """Names the syntax tree of `code`, which must parse."""
    return "tree " + key(tree(code))[:16]


def _result_prints(scores: Sequence[Scores], allocations: Sequence[Allocation], own_allocator: bool) -> tuple[str, str]:
    bits = key([[allocation.weights, allocation.activations] for allocation in allocations])
    return "scores " + key([_spread(each) for each in scores], bits if own_allocator else "")[:16], "bits " + bits[:16]


def _spread(scores: Scores) -> list[list[float]]:
    """Scores as the allocator's `importance` tells them apart: up to a common factor, or shift if not positive."""
    rows = [score if isinstance(score, list) else [score] for score in scores]
    low, high = min(map(min, rows)), max(map(max, rows))
    if low > 0:
        return [[round(math.log(value) - math.log(low), 9) for value in row] for row in rows]
    reach = (high / 2 - low / 2) or 1.0  # halves do not overflow
    return [[round((value / 2 - low / 2) / reach, 9) for value in row] for row in rows]


def tree(code: str) -> str:
    """The syntax tree of `code`, which must parse, without positions and docstrings."""
    parsed = parse(code)
    for node in ast.walk(parsed):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(parsed)


def functions(code: str) -> set[str]:
    """Names of the top-level functions of `code`, which must parse."""
    return {node.name for node in parse(code).body if isinstance(node, ast.FunctionDef)}


def _budget(bench: Bench) -> JSON:
    """What a proxy's own `allocate` gets as `budget`: of one in bytes, what is left for the weights."""
    budget, choices = bench.task.budget, bench.task.choices
    layers, activation = bench.layers, max(choices.activations)
    whole, timed = budget.unit == "B", budget.unit == "s"
    return {
        **({"costs": [_costs(budget, layer, choices, activation) for layer in layers]} if timed else {}),
        "limit": budget.weights_limit(layers, choices.weights, activation) if whole else budget.limit(layers),
        "unit": {"BOPs": "bit operations", "s": "picoseconds"}.get(budget.unit, "bits of weights"),
        "bits": [sorted({weight for weight, _ in choices.of(layer)}) for layer in layers],
        "activation_bits": activation,
        "channel_groups": choices.channel_groups,
        "bits_a_mixed_channel": 8 if whole else 0,
    }


def _costs(budget: Budget, layer: Layer, choices: Choices, activation: int) -> dict[str, JSON]:
    """What a layer takes of the limit at each choice of bits, which is a text as keys of JSON are."""
    return {str(weight): budget.cost(layer, weight, activation) for weight, _ in choices.of(layer)}


def _own_allocation(value: object, bench: Bench) -> Allocation | Rejection:
    """What the proxy's `allocate` returned, checked: bits among the choices, of layers or channels, within budget."""
    if not isinstance(value, list) or len(value) != len(bench.layers):
        return Rejection(Failure.WRONG_SHAPE, f"allocate must return {len(bench.layers)} entries, one a layer.")
    activation = max(bench.task.choices.activations)
    checked = [_own_bits(bits, layer, bench.task.choices) for layer, bits in zip(bench.layers, value, strict=True)]
    weights: list[LayerBits] = []
    for bits in checked:
        if isinstance(bits, Rejection):
            return bits
        weights.append(bits)
    allocation = Allocation(tuple(weights), (activation,) * len(weights))
    try:
        check_within(allocation, bench.layers, bench.task.budget)
    except BudgetMistake as mistake:
        return Rejection(Failure.OVER_BUDGET, str(mistake))
    return allocation


def _own_bits(entry: object, layer: Layer, choices: Choices) -> LayerBits | Rejection:
    """What `allocate` gave a layer, checked: bits, or a list of them, one an output channel."""
    allowed, groups = sorted({weight for weight, _ in choices.of(layer)}), choices.channel_groups
    bits = entry if isinstance(entry, list) else [entry]
    numbers: list[int] = []
    for each in bits:
        if isinstance(each, bool) or not isinstance(each, int) or each not in allowed:
            return Rejection(
                Failure.WRONG_SHAPE, f"allocate gave layer {layer.index} the bits {each!r}; it may take {allowed}."
            )
        numbers.append(each)
    if isinstance(entry, list) and len(entry) != layer.out_channels:
        return Rejection(
            Failure.WRONG_SHAPE,
            f"layer {layer.index} has {layer.out_channels} output channels; allocate gave it {len(entry)} bits.",
        )
    different = len(set(numbers))
    if different > groups:
        return Rejection(
            Failure.WRONG_SHAPE,
            f"allocate gave the channels of layer {layer.index} {different} different bits; {groups} are allowed.",
        )
    return numbers[0] if different == 1 else tuple(numbers)
