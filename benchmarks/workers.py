"""Measuring with one Ray worker and with two: how it scales, and what a job costs on the way.

    python benchmarks/workers.py --images parquet:data/cifar10-val.parquet --weights data/resnet20-cifar10.pt

One CPU and one thread a worker, a job is one allocation on all images. Rounds alternate.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from tap_agent.paths import cache_folder
from tap_eval.allocation.choices import uniform
from tap_eval.images.sources import open_source, split
from tap_eval.kept import Kept
from tap_eval.measuring.cluster import RayExecutor
from tap_eval.measuring.job import Job
from tap_eval.measuring.measurer import Measurer
from tap_eval.measuring.recipe import Bounds, Recipe
from tap_eval.networks.load import load_network
from tap_eval.preparing.prepare import prepare
from tap_eval.quantization.quantizer import Allocation

BITS = (2, 4, 8)


def main() -> None:
    """Prints jobs a second and the share of a job that is not measuring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cifar_resnet20")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", required=True)
    parser.add_argument("--count", type=int, default=2500)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    splits = split(open_source(chosen.images), calibration=None, seed=0, search=chosen.count, test=1)
    prepared = prepare(
        load_network(chosen.network, chosen.weights, cache_folder()).network, splits.calibrations[0].pixels[:2]
    )
    recipe = Recipe("nearest", (8,), chosen.network, Kept(None))
    local = Measurer(prepared, splits, uniform(prepared.layers, 8), Bounds(), recipe)
    rng, rows = random.Random(0), np.arange(len(splits.search))
    eights = (8,) * len(prepared.layers)
    drawn = [Allocation(tuple(rng.choice(BITS) for _ in eights), eights) for _ in range(chosen.jobs)]
    jobs = [Job(allocation, "search", 0, rows, integers=not local.unfit) for allocation in drawn]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with RayExecutor() as executor:
        spread = executor.spread(local)

        def together(workers: int) -> float:
            started = time.perf_counter()
            with ThreadPoolExecutor(workers) as threads:
                list(threads.map(spread.logits, jobs))
            return time.perf_counter() - started

        together(2)  # the actors fetch the network, quantize and pack
        together(2)
        for _ in range(chosen.rounds):
            for workers, found in seconds.items():
                found.append(together(workers))
        empty = [Job(None, "search", 0, rows[:1], integers=False)] * 50
        started = time.perf_counter()
        for job in empty:
            spread.logits(job)
        journey = (time.perf_counter() - started) / len(empty)
    torch.set_num_threads(1)
    local.logits(jobs[0])
    started = time.perf_counter()
    for job in jobs:
        local.logits(job)
    here = time.perf_counter() - started
    one, two = (statistics.median(seconds[workers]) for workers in (1, 2))
    print(f"{len(jobs)} allocations on {len(rows):,} images")
    print(f"this process, one thread: {len(jobs) / here:.2f} a second")
    print(f"one worker: {len(jobs) / one:.2f} a second, two workers: {len(jobs) / two:.2f}, {one / two:.2f} times")
    print(f"a job of one image in full precision, there and back: {1000 * journey:.1f} ms")


if __name__ == "__main__":
    main()
