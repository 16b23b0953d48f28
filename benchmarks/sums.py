"""What 8-bit sums between layers cost in accuracy, beside sums in float32, on the same images and bits.

    PYTHONPATH=. python benchmarks/sums.py cifar_resnet20 --weights data/resnet20-cifar10.pt
        --images parquet:data/cifar10-val.parquet --calibration parquet:data/cifar10-train.parquet
        --search 2500 --bits 8,4,2.5 --exported
    PYTHONPATH=. python benchmarks/sums.py efficientnet_lite0
        --images parquet:data/imagenet-sample-val.parquet --search 300 --bits 8,4 --exported

Bits that are no whole number are those of {2, 3, 4, 8} that measured layer errors ask for under this budget. Each
network is measured as it is rounded a layer at a time and, unless `--no-finish`, as it is finished; mean over the
draws of calibration images, the least and the greatest beside it. The last column is the share of images, in the first
draw, of which one arithmetic finds the class and the other does not.

With `--exported` a second table holds the files of the first draw against what was measured: of all these images, those
of which the class is found.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers import answers
from tap_agent.paths import cache_folder
from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.export.checking import session
from tap_eval.export.onnx import onnx_model
from tap_eval.images.images import Splits
from tap_eval.images.sources import open_source, split
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.networks.load import Loaded, load_network
from tap_eval.quantization.quantizer import Allocation
from tap_eval.quantization.sums import SumsIn

CHOICES = Choices((2, 3, 4, 8))


def main() -> None:
    """Prints a Markdown table."""
    parser = searching(__doc__)
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--finish", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--exported", action="store_true")
    chosen = parser.parse_args()

    loaded, splits = loaded_with_images(chosen, chosen.draws)
    ledger = Ledger(cache_folder() / "measurements.sqlite")

    def opened(sums: SumsIn, budget: str = "8bit") -> Bench:
        task = Task(CHOICES, Budget.parse(budget), sums=sums)
        return Bench(chosen.network, loaded.network, splits, task, ledger)

    benches = {sums: opened(sums) for sums in ("float", "int8")}
    for note in dict.fromkeys(note for bench in benches.values() for note in bench.notes):
        print(note)
    full = benches["float"].measure(None)
    print(
        f"{chosen.network}, {len(splits.search):,} images, {chosen.draws} draws; full precision {100 * full.top1:.2f}\n"
    )
    print("| bits | | float sums | int8 sums | difference | images of two minds |\n|---|---|---|---|---|---|")
    for bits in chosen.bits.split(","):
        allocation = _allocation(benches["float"], bits)
        for finished in (False, True) if chosen.finish else (False,):
            top1 = {}
            for sums, bench in benches.items():
                found = [bench.measure(allocation, draw=draw, finished=finished) for draw in range(chosen.draws)]
                top1[sums] = np.array([100 * each.top1 for each in found])
            off = np.mean(_correct(benches["float"], allocation) != _correct(benches["int8"], allocation))
            columns = [_spread(top1["float"]), _spread(top1["int8"]), f"{np.mean(top1['int8'] - top1['float']):+.2f}"]
            how = "finished" if finished else "a layer at a time"
            print(f"| {bits} | {how} | {' | '.join(columns)} | {'' if finished else f'{100 * off:.2f} %'} |")
    if chosen.exported:
        print("\n| bits | sums | measured | in ONNX Runtime | |\n|---|---|---|---|---|")
        for bits, (sums, bench) in itertools.product(chosen.bits.split(","), benches.items()):
            allocation = _allocation(bench, bits)
            measured = bench.measure(allocation, finished=chosen.finish).correct
            got = _exported(bench, allocation, chosen.finish)
            print(f"| {bits} | {sums} | {measured:,} | {got:,} | {100 * (got - measured) / len(splits.search):+.2f} |")


def searching(description: str | None) -> argparse.ArgumentParser:
    """What a benchmark that measures on search images is told of a network."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", required=True)
    parser.add_argument("--calibration")
    parser.add_argument("--search", type=int, required=True)
    return parser


def loaded_with_images(chosen: argparse.Namespace, draws: int = 1) -> tuple[Loaded, Splits]:
    """The network and the images that were chosen."""
    loaded = load_network(chosen.network, chosen.weights, cache_folder())
    splits = split(
        open_source(chosen.images),
        calibration=open_source(chosen.calibration) if chosen.calibration else None,
        seed=0, draws=draws, search=chosen.search, test=None, transform=loaded.transform,
    )  # fmt: skip
    return loaded, splits


def _exported(bench: Bench, allocation: Allocation, finished: bool) -> int:
    """Of how many search images ONNX Runtime finds the class with the file of the first draw's network."""
    images = bench.splits.search
    opened = session(onnx_model(bench.quantized(allocation, finished=finished), allocation, images.pixels[:16], {}))
    logits = torch.cat([answers(opened, part, len(part)) for part in images.split(100)])
    return int((logits.argmax(1) == images.labels).sum())


def _allocation(bench: Bench, bits: str) -> Allocation:
    if bits.isdigit():
        return uniform(bench.layers, int(bits))
    budget = bench.beside(Budget.parse(f"{bits}bit"))
    return allocate(bench.layer_errors, bench.layers, CHOICES, budget)


def _correct(bench: Bench, allocation: Allocation) -> np.ndarray:
    return np.concatenate([bench.seen(allocation, stage).correct for stage in range(len(bench.stages))])


def _spread(top1: np.ndarray) -> str:
    return f"{top1.mean():.2f} ({top1.min():.2f} to {top1.max():.2f})"


if __name__ == "__main__":
    main()
