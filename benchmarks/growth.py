"""How the cost of measuring grows: with layers, images, bit choices and population.

    python benchmarks/growth.py                # all, some minutes
    python benchmarks/growth.py --only bits    # layers, images, bits or population

Random images and random weights: costs do not depend on them. The last column is the cost beside that of the first row.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision import models

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.images.images import AS_THEY_ARE, Images, room_in
from tap_eval.measuring.layer_errors import layer_errors
from tap_eval.networks.resnet import CifarResNet
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.program import record
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.integer import IntegerNetwork, KeptWeights
from tap_eval.quantization.quantizer import QuantizedNetwork

BITS = (2, 4, 8)
Row = tuple[str, list[float]]


class Ready:
    """A network with everything that a measurement needs."""

    def __init__(self, network: nn.Module, size: int) -> None:
        torch.manual_seed(0)
        images = torch.rand(16, 3, size, size)
        self.size = size
        self.prepared = prepare(network.eval(), images[:2])
        self.layers = self.prepared.layers
        self.quantized = QuantizedNetwork(self.prepared, calibrate(self.prepared, images))
        batch = self.prepared.batch
        self.program = record(self.prepared, images[:1].expand(batch, *images.shape[1:]).contiguous())
        self.network = IntegerNetwork(self.quantized, self.program, (8,) * len(self.layers), KeptWeights(2**31))

    def allocation(self, seed: int, bits: Sequence[int] = BITS, budget: str = "4bit") -> Callable[[], object]:
        """Allocates from random scores, and chooses the bits."""
        rng = random.Random(seed)
        choices = Choices(tuple(bits))

        def chosen() -> None:
            scores = [rng.random() for _ in self.layers]
            self.network.choose(allocate(scores, self.layers, choices, Budget.parse(budget)))

        return chosen


def small(scale: float) -> nn.Module:
    """ResNet-20, or for a trial the smallest of its kind."""
    return CifarResNet(20 if scale >= 1 else 8)


def layers(scale: float) -> list[Row]:
    """Networks of more and more layers; seconds for one image, for an allocation, and for the weights once."""
    networks: dict[str, tuple[nn.Module, int, int]] = {
        "ResNet-20, 32 px": (small(scale), 32, 640),
        "ResNet-56, 32 px": (CifarResNet(56), 32, 640),
        "ResNet-50, 224 px": (models.resnet50(weights=None), 224, 16),
        "ViT-B, 224 px": (models.vit_b_16(weights=None), 224, 16),
    }
    rows: list[Row] = []
    for name, (network, size, count) in list(networks.items())[: 1 if scale < 1 else None]:
        ready = Ready(network, size)
        started = time.perf_counter()
        for layer in ready.quantized.layers:
            for bits in BITS:
                layer.quantized(bits)
        once = time.perf_counter() - started
        images = torch.rand(max(int(count * scale), 2), 3, size, size)
        chosen = seconds(ready.allocation(0), 5)
        passed = seconds(lambda ready=ready, images=images: ready.network.logits(images), 3)  # type: ignore[misc]
        rows.append((f"{name}, {len(ready.layers)} layers", [1000 * passed / len(images), 1000 * chosen, once]))
    return rows


def images(scale: float) -> list[Row]:
    """ResNet-20 over more and more images, decoded into a file; the memory of the process itself at most."""
    ready = Ready(small(scale), 32)
    ready.allocation(0)()
    ready.network.logits(torch.rand(1000, 3, 32, 32))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (1_000, 5_000, 50_000):
            count = int(count * scale)
            stored = room_in(Path(folder), memory=0)((count, 3, 32, 32), np.dtype(np.uint8))
            for part in np.array_split(stored, 10):
                part[:] = np.random.default_rng(0).integers(0, 256, part.shape, np.uint8)
            many = Images(stored, torch.zeros(count, dtype=torch.int64), AS_THEY_ARE)
            started = time.perf_counter()
            with Watched() as memory:
                for start in range(0, count, 5000):
                    ready.network.logits(many.only(np.arange(start, min(start + 5000, count)))).argmax(1)
            rows.append((f"{count:,} images", [time.perf_counter() - started, stored.nbytes / 2**20, memory.most]))
    return rows


class Watched:
    """The most memory (MiB) that was this process's own, pages of files left out, while it was watched."""

    def __enter__(self) -> Watched:
        self.most = 0.0
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch)
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watching.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02) or not self.most:
            status = Path("/proc/self/status").read_text()
            (kib,) = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
            self.most = max(self.most, int(kib) / 1024)


def bits(scale: float) -> list[Row]:
    """ResNet-20 with two to seven choices of bits: an allocation, the weights once, and the layer-error table."""
    rows: list[Row] = []
    for choices in ((2, 8), (2, 4, 8), (2, 3, 4, 6, 8), (2, 3, 4, 5, 6, 7, 8)):
        ready = Ready(small(scale), 32)
        started = time.perf_counter()
        for layer in ready.quantized.layers:
            for choice in choices:
                layer.quantized(choice)
        once = time.perf_counter() - started
        chosen = seconds(ready.allocation(0, choices), 5)
        pixels = torch.rand(max(int(256 * scale), 2), 3, 32, 32)
        started = time.perf_counter()
        layer_errors(ready.quantized, ready.program, pixels, choices)
        rows.append((f"{len(choices)} choices", [1000 * chosen, once, time.perf_counter() - started]))
    return rows


def population(scale: float) -> list[Row]:
    """ResNet-20: allocating and measuring a generation of more and more candidates on the same images."""
    ready = Ready(small(scale), 32)
    pixels = torch.rand(max(int(640 * scale), 2), 3, 32, 32)
    seconds(lambda: (ready.allocation(99)(), ready.network.logits(pixels)), 2)
    rows: list[Row] = []
    for size in (4, 8, 16, 32):
        started = time.perf_counter()
        for seed in range(size):
            ready.allocation(seed)()
            ready.network.logits(pixels)
        rows.append((f"{size} candidates", [time.perf_counter() - started]))
    return rows


def seconds(run: Callable[[], object], rounds: int) -> float:
    """The median, after one round to warm up."""
    run()
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


TABLES: dict[str, tuple[Callable[[float], list[Row]], list[str]]] = {
    "images": (images, ["s a pass", "MiB of images", "MiB of memory at most"]),  # before others have taken memory
    "layers": (layers, ["ms an image", "ms an allocation", "s for the weights, once"]),
    "bits": (bits, ["ms an allocation", "s for the weights, once", "s for the layer errors"]),
    "population": (population, ["s a generation, without the model"]),
}


def main() -> None:
    """Prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TABLES)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images; below 1 for a trial")
    chosen = parser.parse_args()
    for name, (table, heads) in TABLES.items():
        if chosen.only not in (None, name):
            continue
        rows = table(chosen.scale)
        print(f"| {name} | {' | '.join(heads)} | {heads[0]}, times the first |")
        print("|---|" + "---|" * (len(heads) + 1))
        for label, values in rows:
            cells = " | ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)
            print(f"| {label} | {cells} | {values[0] / rows[0][1][0]:.1f} |")
        print(flush=True)


if __name__ == "__main__":
    main()
