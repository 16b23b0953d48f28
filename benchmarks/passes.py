"""How fast one allocation is measured: the integer path beside the network as it is and the simulated path.

    python benchmarks/passes.py cifar_resnet20 --weights data/resnet20-cifar10.pt
        --images parquet:data/cifar10-val.parquet --sweep 512
    PYTHONPATH=. python benchmarks/passes.py efficientnet_lite0
        --images parquet:data/imagenet-sample-val.parquet --count 100 --batch 25

Each round runs all of them once, one after the other in one process; medians and ratios are of
the rounds. Also printed: how often both paths name the same class, over random allocations, and
what switching to an allocation that was not there before costs of a pass over 2,500 images, once
every (layer, bits) has been quantized.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tap_agent.paths import cache_folder
from tap_eval.images.sources import open_source
from tap_eval.measuring.layer_errors import layer_errors, layer_errors_one_by_one
from tap_eval.networks.load import load_network
from tap_eval.preparing.layers import Layer
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.program import record
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.integer import IntegerNetwork, KeptWeights
from tap_eval.quantization.quantizer import Allocation, LayerBits, QuantizedNetwork

CHOICES = (2, 3, 4, 8)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--random", action="store_true", help="random weights, for networks without any here")
    parser.add_argument("--images", required=True)
    parser.add_argument("--count", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=125, help="of the eager network and of the simulated path")
    parser.add_argument("--integer-batch", type=int, help="by default what a run would take")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--allocations", type=int, default=4)
    parser.add_argument("--sweep", type=int, default=0, help="images for the layer-error sweep, 0 for none")
    chosen = parser.parse_args()

    network = (
        _random(chosen.network)
        if chosen.random
        else load_network(chosen.network, chosen.weights, cache_folder()).network
    )
    source = open_source(chosen.images)
    pixels = source.decode(range(min(chosen.count, len(source.labels))), None).pixels
    prepared = prepare(network, pixels[:2])
    simulated = QuantizedNetwork(prepared, calibrate(prepared, pixels[-16:]))
    batch = chosen.integer_batch or prepared.batch
    program = record(prepared, pixels[:1].expand(batch, *pixels.shape[1:]).contiguous())
    integers = IntegerNetwork(simulated, program, (8,) * len(prepared.layers), KeptWeights(2**31))
    rng = random.Random(0)
    allocations = [_drawn(prepared.layers, rng) for _ in range(chosen.allocations)]

    started = time.perf_counter()
    for layer in simulated.layers:
        for bits in CHOICES:
            layer.quantized(bits)
    quantizing = time.perf_counter() - started
    agree: list[float] = []
    for allocation in allocations:
        simulated.choose(allocation)
        integers.choose(allocation)
        same = simulated.logits(pixels, chosen.batch).argmax(1) == integers.logits(pixels).argmax(1)
        agree.append(float(same.double().mean()))

    @torch.inference_mode()
    def eager() -> None:
        for part in pixels.split(chosen.batch):
            network(part)

    seconds = _alternating(
        {
            "eager float32": eager,
            "simulated": lambda: simulated.logits(pixels, chosen.batch),
            "integers": lambda: integers.logits(pixels),
            "switching": lambda: integers.choose(_drawn(prepared.layers, rng)),
        },
        chosen.rounds,
    )
    print(f"{chosen.network}, {len(pixels):,} images, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | seconds | images a second | times eager | times simulated |\n|---|---|---|---|---|")
    for name in ("eager float32", "simulated", "integers"):
        ratios = [f"{seconds[other] / seconds[name]:.2f}" for other in ("eager float32", "simulated")]
        print(f"| {name} | {seconds[name]:.3f} | {len(pixels) / seconds[name]:,.0f} | {' | '.join(ratios)} |")
    share = 100 * seconds["switching"] / (seconds["integers"] * 2500 / len(pixels))
    print(f"\nswitching to an allocation never seen: {share:.2f} % of a pass over 2,500 images in integers")
    print(f"quantizing all {len(prepared.layers)} layers at {len(CHOICES)} bits, once a network: {quantizing:.1f} s")
    print(f"same class on both paths: {', '.join(f'{100 * share:.2f} %' for share in agree)} of the images")
    if chosen.sweep:
        part = pixels[: chosen.sweep]
        times = _alternating(
            {
                "sweep": lambda: layer_errors(simulated, program, part, CHOICES),
                "one by one": lambda: layer_errors_one_by_one(simulated, part, chosen.batch, CHOICES),
            },
            max(chosen.rounds // 2, 1),
        )
        print(
            f"layer errors, {len(prepared.layers)} layers x {len(CHOICES)} bits, {len(part)} images: "
            f"{times['sweep']:.1f} s in one sweep, {times['sweep'] / times['one by one']:.2f} of one by one"
        )


def _random(name: str) -> torch.nn.Module:
    from torchvision import models

    torch.manual_seed(0)
    network = models.get_model(name, weights=None).eval()
    for parameter in network.parameters():  # torchvision leaves some heads at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return network


def _drawn(layers: tuple[Layer, ...], rng: random.Random) -> Allocation:
    """Random bits; in every other layer each output channel has its own."""
    weights: list[LayerBits] = [
        tuple(rng.choice(CHOICES) for _ in range(layer.out_channels)) if layer.index % 2 else rng.choice(CHOICES)
        for layer in layers
    ]
    return Allocation(tuple(weights), (8,) * len(layers))


def _alternating(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each, over rounds of all of them, after one to warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                found[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
