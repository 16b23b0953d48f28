"""Rounding that is learned block by block (BRECQ, Li et al. 2021, arXiv:2102.05426), beside that of the program.

    PYTHONPATH=. python benchmarks/reconstruction.py cifar_resnet20 --weights data/resnet20-cifar10.pt
        --images parquet:data/cifar10-val.parquet --calibration parquet:data/cifar10-train.parquet
        --search 2500 --bits 3,2 --draws 3

A block is what lies in one module of the network, as a residual block. Whether each weight is rounded up or down is
learned (AdaRound's sigmoid, which is drawn to 0 and 1) so that what the block gives, on what the blocks before it make
of the calibration images once they are quantized, is what it gives in full precision. All images are in each step, with
inputs of layers and sums in 8 bits; all of a block's output counts alike, without the paper's Fisher information. Mean
over draws of calibration images, on search images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.sums import CHOICES, loaded_with_images, searching
from tap_agent.paths import cache_folder
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import uniform
from tap_eval.measuring.accuracy import Accuracy, Measurement
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.recorder import Recorder
from tap_eval.measuring.task import Task
from tap_eval.preparing.products import multiply
from tap_eval.preparing.program import Environment, Program, Step, bind
from tap_eval.quantization.quantizer import Affine, QuantizedLayer, QuantizedNetwork, QuantizedWeight, output_mean
from tap_eval.quantization.rounding import Rounding, nearest

_RATE, _WEIGHT = 1e-2, 0.01
"""of Adam, and of the penalty for what is neither up nor down"""
_WARM = 0.2
"""of the steps, before the penalty begins"""
_STRETCH, _SHIFT = 1.2, -0.1
"""of the sigmoid, so that it reaches 0 and 1"""


def main() -> None:
    """Prints a Markdown table."""
    parser = searching(__doc__)
    parser.add_argument("--bits", default="3,2")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="a block")
    chosen = parser.parse_args()
    loaded, splits = loaded_with_images(chosen, chosen.draws)
    ledger = Ledger(cache_folder() / "measurements.sqlite")

    def opened(rounding: Rounding) -> Bench:
        task = Task(CHOICES, Budget.parse("8bit"), rounding=rounding)
        return Bench(chosen.network, loaded.network, splits, task, ledger)

    plain, bench = opened("nearest"), opened("gptq")
    print("| bits | nearest: KL, top-1 | learned block by block | GPTQ | GPTQ, finished |\n|---|---|---|---|---|")
    for bits in map(int, chosen.bits.split(",")):
        allocation, draws = uniform(bench.layers, bits), range(chosen.draws)
        measured = [
            [(each.kl, each.top1) for each in row]
            for row in (
                [plain.measure(allocation, draw=draw) for draw in draws],
                [_learned(bench, bits, draw, chosen.steps) for draw in draws],
                [bench.measure(allocation, draw=draw) for draw in draws],
                [bench.measure(allocation, draw=draw, finished=True) for draw in draws],
            )
        ]
        cells = [f"{kl:.3f}, {100 * top1:.1f}" for kl, top1 in (np.mean(row, axis=0) for row in measured)]
        print(f"| {bits} | {' | '.join(cells)} |", flush=True)


def _learned(bench: Bench, bits: int, draw: int, steps: int) -> Accuracy:
    """What a network whose blocks have learned their rounding under a draw makes of the search images."""
    search, pixels = bench.splits.search, bench.splits.calibrations[draw].pixels
    network = bench.quantized(uniform(bench.layers, bits), draw, finished=False)
    reconstruct(network, Recorder(bench.prepared, pixels)(len(pixels)), pixels, bits, steps)
    batch = bench.prepared.batch
    full = torch.cat([bench.prepared(part) for part in search.split(batch)]).detach()
    return Measurement.of(network.logits(search, batch), full, search.labels).accuracy


def reconstruct(network: QuantizedNetwork, program: Program, pixels: Tensor, bits: int, steps: int) -> None:
    """Leaves a network with weights of `bits` that are learned on calibration images (N, C, H, W), one pass of them."""
    sums = network.rounded_in(program)
    with torch.no_grad():
        theirs, ours = program.begin(pixels), program.begin(pixels)
    for start, end in _blocks(network, program):
        layers = {step.layer: Learned(network.layers[step.layer], bits) for step in program.steps[start:end]
                  if step.layer is not None}  # fmt: skip
        block = [_straight(step, layers, sums) for step in program.steps[start:end]]
        before = set(theirs)
        with torch.no_grad():
            for step in bind(program, network.prepared.modules).steps[start:end]:
                step.run(theirs)
        made = {value: wanted for value, wanted in theirs.items() if value not in before}
        if layers and made:
            _fit(block, ours, made, layers, steps)
        for layer, learned in layers.items():
            network.layers[layer].take(learned.weight(), 8)
        with torch.no_grad():
            for step in network.bound(program).steps[start:end]:
                step.run(ours)


def _blocks(network: QuantizedNetwork, program: Program) -> Iterator[tuple[int, int]]:
    """Where the steps of each block begin and end: those from its first layer to that of the next."""
    names = [network.prepared.layers[step.layer].block if step.layer is not None else None for step in program.steps]
    starts, last = [0], None
    for place, name in enumerate(names):
        if name is not None and name != last:
            starts += [place] if last is not None else []
            last = name
    yield from itertools.pairwise([*starts, len(program.steps)])


def _fit(
    block: Sequence[Step],
    before: Environment,
    wanted: Environment,
    layers: Mapping[int, Learned],
    steps: int,
) -> None:
    optimizer = torch.optim.Adam([layer.up for layer in layers.values()], _RATE)
    for step in range(steps):
        known = dict(before)
        for each in block:
            each.run(known)
        loss = sum((known[value] - each).square().mean() for value, each in wanted.items())
        done = (step / steps - _WARM) / (1 - _WARM)
        if done > 0:
            power = 2 + 9 * (1 + np.cos(np.pi * done))  # from 20 to 2
            rest = [(1 - (2 * layer.share() - 1).abs().pow(power)).sum() for layer in layers.values()]
            loss = loss + _WEIGHT * sum(rest) / sum(layer.up.numel() for layer in layers.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Learned:
    """A layer whose weights are between two integers."""

    def __init__(self, layer: QuantizedLayer, bits: int) -> None:
        weight = layer.layer.weight.detach()
        self.layer, self.bits = layer, bits
        self.top = 2 ** (bits - 1) - 1
        self.scale = nearest(weight, bits).scale
        real = weight / self._each(self.scale)
        self.below = real.floor()
        share = ((real - self.below).clamp(0.01, 0.99) - _SHIFT) / _STRETCH
        self.up = (share / (1 - share)).log().requires_grad_()
        self.bias = self.weight().bias

    def _each(self, scale: Tensor) -> Tensor:
        return scale.view(-1, *[1] * (self.layer.layer.weight.dim() - 1))

    def share(self) -> Tensor:
        """How far each weight is rounded up, in [0, 1]."""
        return (self.up.sigmoid() * _STRETCH + _SHIFT).clamp(0, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer gives of an input in integers; gradients go through all roundings."""
        weight = self._each(self.scale) * (self.below + self.share()).clamp(-self.top, self.top)
        assert self.layer.affine is not None
        return multiply(self.layer.layer, _through(x, self.layer.affine), weight, self.bias)

    @torch.no_grad()
    def weight(self) -> QuantizedWeight:
        """As it is rounded by now, with a bias that leaves the mean output what it was."""
        layer = self.layer.layer
        integers = (self.below + self.share().round()).clamp(-self.top, self.top)
        shift = output_mean(integers * self._each(self.scale) - layer.weight, self.layer.seen.mean_patch)
        bias = -shift if layer.bias is None else layer.bias - shift
        bits = torch.full_like(bias, self.bits, dtype=torch.int8)
        return QuantizedWeight(integers.to(torch.int8), self.scale, bias, bits)


def _through(x: Tensor, affine: Affine) -> Tensor:
    """What integers stand for, with the gradient of what is not cut off."""
    cut = x.clamp(*affine.range)
    return cut + (affine.rounded(x.detach()) - cut).detach()


def _straight(step: Step, layers: Mapping[int, Learned], sums: Mapping[object, Affine]) -> Step:
    """A step of a block that gradients go through."""
    function: Callable[..., Tensor] = step.function if step.layer is None else layers[step.layer]
    if (affine := sums.get(step.value)) is None:
        return replace(step, function=function)
    return replace(step, function=lambda *args, **kwargs: _through(function(*args, **kwargs), affine))


if __name__ == "__main__":
    main()
