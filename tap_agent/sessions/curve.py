"""Accuracy against size beside the final table: the best proxy and two baselines at budgets around the run's."""

from __future__ import annotations

from graphs.state import Candidate
from tap_agent.sessions.final_table import Entry, beside
from tap_agent.sessions.resources import Resources
from tap_eval.allocation.budget import Budget
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BudgetMistake
from tap_eval.proxies.proxy import Rejection
from tools.evaluation import score

REACH = 2
"""bits a weight from the run's own size to the furthest budget: far enough to see where accuracy falls off"""
_BESIDE = ("uniform", "layer_error")


def curve_entries(resources: Resources, best: Candidate) -> list[Entry]:
    """The best proxy, uniform bits and measured layer error of every network, at the budgets of `near`."""
    entries: list[Entry] = []
    for bench, bits in zip(resources.benches, best.allocations, strict=False):
        sizes = [layer.params * mean for layer, mean in zip(bench.layers, bits.means(), strict=True)]
        for budget in near(bench, sum(sizes) / sum(layer.params for layer in bench.layers)):
            try:
                there = bench.at(budget)
            except BudgetMistake:  # of pinned ends, whose bits are not theirs to choose
                continue
            scored = score(best.code, [there], resources.sandbox)
            if not isinstance(scored, Rejection):  # its own allocator may know no other budget
                own = f"TAP ({best.name})"
                entries.append(Entry(there, budget.text, own, "proxy", "", scored.allocations))
            entries += beside(there, resources.settings, names=_BESIDE)
    return entries


def near(bench: Bench, bits: float) -> list[Budget]:
    """Whole bits up to `REACH` from `bits`, rounded, that the choices allow, but for the network's own budget."""
    choices, own = bench.task.choices.weights, bench.task.budget
    whole = [each for each in range(min(choices), max(choices) + 1) if abs(each - round(bits)) <= REACH]
    found = [Budget.parse(f"{each}bit") for each in whole]
    return [each for each in found if own.unit in ("BOPs", "s") or each.limit(bench.layers) != own.limit(bench.layers)]
