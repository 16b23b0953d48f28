"""Top-1 of bits that published proxies allocate, on search images alone, beside uniform bits and random scores.

    PYTHONPATH=. python benchmarks/published.py cifar_resnet20 --weights data/resnet20-cifar10.pt --search 2500
        --images parquet:data/cifar10-val.parquet --calibration parquet:data/cifar10-train.parquet
        --budgets 2.25bit,2.5bit,3bit

Weights in {2, 3, 4, 8} under one draw of 16 calibration images, bits a layer or, with `--channel-groups`, for groups of
channels; each network as it is rounded a layer at a time, and as it is finished. With 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.sums import loaded_with_images, searching
from tap_agent.paths import cache_folder
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.baselines.baselines import baselines
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.proxies.proxy import Rejection
from tap_eval.proxies.published import NAMES, published
from tap_eval.quantization.quantizer import Allocation
from tools.evaluation import score
from tools.sandbox import MontySandbox


def main() -> None:
    """Prints a Markdown table."""
    parser = searching(__doc__)
    parser.add_argument("--budgets", default="2.5bit")
    parser.add_argument("--channel-groups", type=int, default=4)
    chosen = parser.parse_args()

    loaded, splits = loaded_with_images(chosen)
    task = Task(Choices((2, 3, 4, 8), channel_groups=chosen.channel_groups), Budget.parse("8bit"))
    ledger = Ledger(cache_folder() / "measurements.sqlite")
    bench = Bench(chosen.network, loaded.network, splits, task, ledger)
    print("| budget | allocation from | a layer at a time | finished |\n|---|---|---|---|")
    print(f"| | full precision | {bench.measure(None)} | |")
    with MontySandbox() as sandbox:
        for budget in chosen.budgets.split(","):
            at = bench.at(Budget.parse(budget))
            for name in NAMES:
                found = score(published(name).code, [at], sandbox)
                if isinstance(found, Rejection):
                    print(f"| {budget} | `{name}` | {found.message} | |")
                else:
                    print(f"| {budget} | `{name}` | {_shown(at, found.allocations)} |")
            for baseline in baselines(at, seed=0):
                if baseline.label.startswith(("uniform", "random")):
                    print(f"| {budget} | {baseline.label} | {_shown(at, baseline.allocations)} |")


def _shown(bench: Bench, allocations: Sequence[Allocation]) -> str:
    """Top-1, of several allocations over all their images."""
    cells = []
    for finished in (False, True):
        found = [bench.measure(allocation, finished=finished) for allocation in allocations]
        mean = sum(each.top1 for each in found) / len(found)
        cells.append(str(found[0]) if len(found) == 1 else f"{100 * mean:.1f} % (mean of {len(found)})")
    return " | ".join(cells)


if __name__ == "__main__":
    main()
