"""The winners of `seeds.py`, applied unchanged to another network or within other budgets.

    PYTHONPATH=. python benchmarks/transfer.py seeds.jsonl configs/lite0-imagenet.yaml --budget 4bit

A row each of evolution and of one-shot proposals, the mean and standard deviation over their winners, under the first
draw of the config; beside them uniform bits, random scores and the measured layer errors. KL divergence (nats) and
top-1 of the network that is kept, on test images. A winner that fails there is counted in a column.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.seeds import BESIDE, cell
from tap_agent.paths import cache_folder
from tap_agent.sessions.apply import opening
from tap_agent.sessions.resources import Resources
from tap_agent.settings.read import read_settings
from tap_eval.allocation.budget import Budget
from tap_eval.baselines.baselines import baselines
from tap_eval.measuring.bench import Bench
from tap_eval.proxies.proxy import Rejection
from tap_eval.quantization.quantizer import Allocation
from tools.evaluation import score


def main() -> None:
    """Prints a Markdown table a network and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--budget", required=True)
    chosen = parser.parse_args()
    searches: dict[str, list[str]] = {}
    for row in map(json.loads, chosen.seeds.read_text().splitlines()):
        if "code" in row:
            searches.setdefault(row["from"], []).append(row["code"])
    settings = opening(read_settings(chosen.config, {}), 1)
    with Resources(settings, cache_folder()) as resources:
        for opened in resources.benches:
            for budget in Budget.parse_all(chosen.budget):
                bench = opened.at(budget)
                print(f"\n{bench.name} at {budget.text}\n\n| allocation from | KL, top-1 | failed |\n|---|---|---|")
                for name, codes in searches.items():
                    found = [score(code, [bench], resources.sandbox) for code in codes]
                    allocated = [each.allocations[0] for each in found if not isinstance(each, Rejection)]
                    print(f"| {name} | {_told(bench, allocated)} | {len(found) - len(allocated)} |", flush=True)
                for rule in baselines(bench, settings.seed):
                    if rule.label.startswith(BESIDE):
                        print(f"| {rule.label} | {_told(bench, rule.allocations)} | |", flush=True)


def _told(bench: Bench, allocations: Sequence[Allocation]) -> str:
    """KL and top-1 on test images; "" of no allocation."""
    if not allocations:
        return ""
    (found,) = bench.measure_all(allocations, "test", [0], kept=True)
    return cell([{"kl": each.kl, "top1": each.top1} for each in found])


if __name__ == "__main__":
    main()
