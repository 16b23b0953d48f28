"""Proxies and simple rules side by side at several budgets, on the search images of the digits network.

python examples/compare.py
"""

from __future__ import annotations

from tap_agent.paths import cache_folder
from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.baselines.baselines import baselines
from tap_eval.images.sources import open_source, split
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.networks.load import load_network
from tap_eval.quantization.quantizer import Allocation

BUDGETS = ("2.5bit", "3bit", "4bit")


def proxies(bench: Bench) -> dict[str, list[float]]:
    """Scores a layer by rules that see no more than a proxy may."""
    layers = bench.features
    return {
        "macs per weight": [layer["macs"] / layer["params"] for layer in layers],
        "entropy of the outputs": [layer["activation_entropy"] for layer in layers],
        "weight norm per weight": [layer["weight_l2"] / layer["params"] for layer in layers],
    }


def main() -> None:
    """Prints a table of accuracies in per cent, and of the KiB that each allocation takes."""
    cache = cache_folder()
    images = split(open_source("digits"), calibration=None, seed=0)
    network = load_network("digits", None, cache).network
    ledger = Ledger(cache / "measurements.sqlite")
    columns: list[dict[str, tuple[Allocation, ...]]] = []
    for text in BUDGETS:
        bench = Bench("digits", network, images, Task(Choices(), Budget.parse(text)), ledger)
        ours = {
            name: (allocate(scores, bench.layers, bench.task.choices, bench.task.budget),)
            for name, scores in proxies(bench).items()
        }
        rules = {baseline.label.split(" W")[0]: baseline.allocations for baseline in baselines(bench, seed=0)}
        columns.append(ours | rules)
    print(f"{'':24}" + "".join(f"{text:>20}" for text in BUDGETS))
    for name in columns[0]:
        cells = []
        for column in columns:
            (found,) = bench.measure_all(column[name], "search", [0])
            top1 = sum(each.top1 for each in found) / len(found)
            size = bench.size(column[name][0]).total / 1024
            cells.append(f"{100 * top1:8.1f} % {size:5.2f} KiB")
        print(f"{name:24}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"{'full precision':24}{100 * bench.measure(None).top1:9.1f} %")


if __name__ == "__main__":
    main()
