"""What a proxy is compared with at the same budget: simple rules, published ones, and those that see more than it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tap_eval.baselines import (
    auto_quantize,
    best_of_random,
    bops,
    bparams,
    direct,
    earlier,
    emq,
    every_error,
    hawq,
    hawq_v2,
    hawq_v3,
    layer_error,
    ompq,
    random_scores,
    snip,
    synflow,
    uniform,
    weight_error,
)
from tap_eval.baselines.rule import Cost, Effort, Rule, Seen
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import Mistake
from tap_eval.quantization.quantizer import Allocation

_MODULES = (
    uniform, random_scores, earlier, weight_error, layer_error, bparams, bops, hawq, hawq_v2, hawq_v3, ompq, emq, snip,
    synflow, auto_quantize, every_error, best_of_random, direct,
)  # fmt: skip
RULES: dict[str, Rule] = {module.__name__.rpartition(".")[2]: module.RULE for module in _MODULES}
"""by the names that `--baselines` takes, in the order of tables"""
ALL, FAST = "all", "fast"


class BaselineMistake(Mistake):
    """A name that no baseline has."""

    kind = "config"


@dataclass(frozen=True)
class Baseline:
    """A rule's allocations for one network; several where it draws at random."""

    label: str
    note: str
    allocations: tuple[Allocation, ...]
    sees: tuple[Seen, ...] = ()
    cost: Cost = Cost()


def named(names: Sequence[str]) -> list[str]:
    """The rules that `names` mean, `all` and `fast` among them, each once, in the order of tables.

    Raises `BaselineMistake` where one is unknown.
    """
    found: set[str] = set()
    for name in names:
        if name == ALL:
            found |= set(RULES)
        elif name == FAST:
            found |= {each for each, rule in RULES.items() if rule.fast}
        elif name in RULES:
            found.add(name)
        else:
            near = difflib.get_close_matches(name, [ALL, FAST, *RULES], 1)
            raise BaselineMistake(
                f"'{name}' is no baseline{': perhaps ' + near[0] if near else ''}; give all, fast, or some of "
                f"{', '.join(RULES)}."
            )
    return [name for name in RULES if name in found]


def losses(
    bench: Bench, seed: int, left_out: Callable[[str], None], advance: Callable[[], None] = lambda: None
) -> dict[str, list[list[float]]]:
    """What layers lose at each of the weight bits, in rising order, with activations at their most, by rule.

    Of rules that foretell more than their own allocation. `left_out` is given a sentence where the network has not what
    one needs; `advance` is called after each.
    """
    choices, found = bench.task.choices, {}
    for name, rule in RULES.items():
        loss = None
        if not rule.searches:
            try:
                loss = rule.find(bench, Effort(seed, 0)).loss
            except Mistake as mistake:
                left_out(f"{rule.label}: {mistake}")
        if loss:
            bits = [(weight, max(choices.activations)) for weight in sorted(choices.weights)]
            found[name] = [[float(loss(layer.index, *each)) for each in bits] for layer in bench.layers]
        advance()
    return found


def baselines(
    bench: Bench,
    seed: int,
    names: Sequence[str] = (FAST,),
    measurements: int = 48,
    left_out: Callable[[str], None] | None = None,
    tell: Callable[[str], None] = lambda label: None,
) -> list[Baseline]:
    """Those of `names` that the network can have.

    `measurements` is how many allocations a rule that searches may measure. `left_out` is given a sentence where the
    network has not what a rule needs, a `Mistake` without it; `tell` the label of each rule before it is computed.
    """
    rows = []
    for name in named(names):
        rule = RULES[name]
        tell(rule.label)
        try:
            found = rule.find(bench, Effort(seed, measurements))
        except Mistake as mistake:
            if left_out is None:
                raise
            left_out(f"{rule.label}: {mistake}")
            continue
        if found.allocations:
            rows.append(Baseline(found.label or rule.label, found.note, found.allocations, rule.sees, found.cost))
    return rows
