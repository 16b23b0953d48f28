"""How long an allocation takes, from scores to bits.

    python benchmarks/allocator.py

Random networks and scores, other ones in each round: sizes as in ResNets, vision transformers and MobileNets, scores
that are drawn, that follow the sizes, or of which many are the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.score import Score
from tap_eval.allocation.size import fixed_bytes
from tap_eval.preparing.layers import Layer

NETWORKS = {"20 layers": (20, 1), "200 layers": (200, 1), "50 layers of 4 groups": (50, 4)}
CHOICES = {
    "2, 4, 8": ((2, 4, 8), (8,)),
    "2, 3, 4, 8": ((2, 3, 4, 8), (8,)),
    "2, 3, 4, 8, activations 4, 8": ((2, 3, 4, 8), (4, 8)),
}
AT_ONCE = 4
Instance = tuple[list[Score], list[Layer], Choices, Budget]


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    chosen = parser.parse_args()
    print(f"| units | bits | budget | median ms | greatest ms | ms each, {AT_ONCE} at once |")
    print("|---|---|---|---|---|---|")
    for name, (count, groups) in NETWORKS.items():
        for bits, (weights, activations) in CHOICES.items():
            for unit in ("BOPs",) if len(activations) > 1 else ("bit", "bytes", "BOPs"):
                choices = Choices(weights, activations, channel_groups=groups)
                drawn = [instance(seed, count, choices, unit) for seed in range(chosen.rounds)]
                alone = [seconds(partial(allocate, *each)) for each in drawn]
                with ThreadPoolExecutor(AT_ONCE) as threads:
                    together = seconds(partial(all_of, threads, drawn))
                cells = [statistics.median(alone), max(alone), together / len(drawn)]
                shown = " | ".join(f"{1000 * cell:.1f}" for cell in cells)
                print(f"| {name} | {bits} | {unit} | {shown} |", flush=True)


def instance(seed: int, count: int, choices: Choices, unit: str) -> Instance:
    """A network of `count` layers, scores for it, and a budget between the least and the most."""
    rng = np.random.default_rng(seed)
    kind = seed % 3
    layers = []
    for index in range(count):
        stage = 4 * index // count
        if kind == 0:  # a ResNet
            inputs, outputs, kernel, pixels = 64 << stage, 64 << stage, int(rng.choice([1, 9])), (56 >> stage) ** 2
        elif kind == 1:  # a vision transformer
            inputs, outputs = [(768, 2304), (768, 768), (768, 3072), (3072, 768)][index % 4]
            kernel, pixels = 1, 197
        else:  # a MobileNet
            inputs, outputs = 8 * int(rng.integers(2, 80)), 8 * int(rng.integers(2, 80))
            inputs, kernel = (1, 9) if index % 3 == 1 else (inputs, 1)
            pixels = (112 >> stage) ** 2
        params = inputs * outputs * kernel
        layers.append(
            Layer(
                name=f"layer{index}", kind="conv", block="", index=index, depth=(index + 1) / count, in_channels=inputs,
                out_channels=outputs, kernel=1, stride=1, groups=1, input_size=1, output_size=1, tokens=1,
                params=params, macs=params * pixels, first=index == 0, last=index == count - 1,
            )
        )  # fmt: skip
    values = [
        rng.lognormal(0, 1.5, count),
        np.array([layer.params for layer in layers]) ** -0.5 * rng.lognormal(0, 0.3, count),
        rng.integers(1, 4, count).astype(float),
        np.array([float(layer.params) for layer in layers]),
    ][seed % 4]
    scores: list[Score] = values.tolist()
    if choices.channel_groups > 1:
        drawn = zip(values, layers, strict=True)
        scores = [(value * rng.lognormal(0, 0.5, layer.out_channels)).tolist() for value, layer in drawn]
    mean = rng.uniform(2.3, 6)
    if unit == "bit":
        return scores, layers, choices, Budget.parse(f"{mean:.4f}bit")
    if unit == "bytes":
        weights = round(sum(layer.params for layer in layers) * mean / 8)
        return scores, layers, choices, Budget.parse(f"{weights + fixed_bytes(layers, 0)}B")
    total = sum(layer.macs for layer in layers) * mean * max(choices.activations)
    return scores, layers, choices, Budget.parse(f"{total / 1e6:.6f}MBOPs")


def all_of(threads: ThreadPoolExecutor, drawn: list[Instance]) -> None:
    """Allocates for each, as many at once as there are threads."""
    list(threads.map(allocate, *zip(*drawn, strict=True)))


def seconds(run: Callable[[], object]) -> float:
    """Of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
