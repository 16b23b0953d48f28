"""Whether images and finishing keep the order of allocations of one size, by KL divergence and by top-1.

    PYTHONPATH=. python benchmarks/order.py cifar_resnet20 --weights data/resnet20-cifar10.pt --search 2500
        --images parquet:data/cifar10-val.parquet --calibration parquet:data/cifar10-train.parquet
        --budgets 2.25bit,2.5bit --count 15

Allocations of random scores and of the measured layer errors, weights in {2, 3, 4, 8}, under one draw of 16 calibration
images. A column is the rank correlation (Spearman) over them: of what the search sees with the same on test images; of
networks rounded a layer at a time with the same ones finished; and of what the search sees with finished networks on
test images, which is what a search is for.
"""

from __future__ import annotations

import random

from scipy.stats import spearmanr

from benchmarks.sums import CHOICES, loaded_with_images, searching
from tap_agent.paths import cache_folder
from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task

_SPREAD = 1.5
"""standard deviation of the logarithm of random scores: some two bits between layers"""


def main() -> None:
    """Prints a Markdown table."""
    parser = searching(__doc__)
    parser.add_argument("--budgets", default="2.5bit")
    parser.add_argument("--count", type=int, default=15, help="allocations at each budget")
    chosen = parser.parse_args()
    loaded, splits = loaded_with_images(chosen)
    ledger = Ledger(cache_folder() / "measurements.sqlite")
    bench = Bench(chosen.network, loaded.network, splits, Task(CHOICES, Budget.parse("8bit")), ledger)
    print("| budget | by | least, most on test, finished | search, test | plain, finished | search, test finished |")
    print("|---|---|---|---|---|---|")
    for budget in Budget.parse_all(chosen.budgets):
        at, rng = bench.at(budget), random.Random(0)
        scores = [[rng.lognormvariate(0, _SPREAD) for _ in at.layers] for _ in range(chosen.count - 1)]
        allocations = [allocate(each, at.layers, CHOICES, at.task.budget) for each in [*scores, at.layer_errors]]
        at.finish(allocations, [0])
        found = {
            (split, finished): [at.measure(each, split, finished=finished) for each in allocations]
            for split in ("search", "test")
            for finished in (False, True)
        }  # type: ignore[misc]
        for by in ("kl", "top1"):
            plain, tested, done, last = (
                [getattr(each, by) for each in found[which]]
                for which in (("search", False), ("test", False), ("search", True), ("test", True))
            )
            pairs = ((plain, tested), (plain, done), (plain, last))
            cells = [f"{min(last):.4f}, {max(last):.4f}", *(f"{spearmanr(*pair)[0]:.2f}" for pair in pairs)]
            print(f"| {budget.text} | {by} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
