"""How fast allocations are measured on a device: the simulated path beside the network as it is.

    python benchmarks/devices.py resnet50 --device cuda --count 1000

The network has random weights and sees noise, both without effect on its speed. Images are on the device before. Each
round runs all of them once, one after the other in one process; medians are of the rounds. TF32 is how PyTorch runs
convolutions, unless it is told otherwise, and loses digits; the simulated path multiplies whole numbers in it, which
does not. Also printed: in how many layers tensor cores gave these whole numbers, and how often the CPU's simulated
path names the same class.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tap_eval.device import CPU, called, chosen, found, in_float32, on, tf32
from tap_eval.preparing.prepare import prepare
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork

CHOICES = (2, 3, 4, 8)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="one of torchvision's classifiers")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--count", type=int, default=1000, help="images a pass")
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--compared", type=int, default=32, help="images that the CPU classifies too")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()

    device = chosen(given.device, found())[0]
    in_float32(device)
    torch.manual_seed(0)
    noise = torch.randn(given.count, 3, given.size, given.size)
    network = _random(given.network)
    prepared = prepare(network, noise[:2])
    resident = prepared if device == CPU else prepared.on(device)
    simulated = QuantizedNetwork(resident, calibrate(resident, noise[:16]))
    rng = random.Random(0)
    count = len(prepared.layers)
    allocation = Allocation(tuple(rng.choice(CHOICES) for _ in range(count)), (8,) * count)
    simulated.choose(allocation)
    beside = network.to(device)
    pixels = noise.to(device)
    last = pixels.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def eager(pixels: Tensor) -> Tensor:
        return torch.cat([beside(part) for part in pixels.split(given.batch)]).cpu()

    def eager_in_tf32() -> Tensor:
        with tf32():
            return eager(last)

    runs: dict[str, Callable[[], Tensor]] = {
        "eager float32": lambda: eager(pixels),
        "eager float32, channels last": lambda: eager(last),
        **({"eager TF32, channels last": eager_in_tf32} if device.type == "cuda" else {}),
        "simulated, channels last": lambda: simulated.logits(last, given.batch).cpu(),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(given.rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    print(
        f"{given.network}, {given.count:,} images at {given.size} px in batches of {given.batch}, {called(device)}, ",
        end="",
    )
    print(f"torch {torch.__version__}\n")
    print("| | seconds | images a second | times eager float32 |\n|---|---|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {taken:.3f} | {given.count / taken:,.0f} | {seconds['eager float32'] / taken:.2f} |")
    exact = sum(bool(layer.in_tf32) and all(layer.in_tf32.values()) for layer in simulated.layers)
    print(f"\nwhole numbers in TF32 in {exact} of {count} layers")
    here = QuantizedNetwork(prepared, [on(layer.seen, CPU) for layer in simulated.layers])
    here.take(
        [on(layer.quantized(bits), CPU) for layer, bits in zip(simulated.layers, allocation.weights, strict=True)],
        allocation.activations,
    )
    some = noise[: given.compared]
    got, expected = simulated.logits(some, given.batch).cpu(), here.logits(some, given.batch)
    apart = float((got - expected).abs().mean() / expected.abs().max())
    same = float((got.argmax(1) == expected.argmax(1)).double().mean())
    print(f"beside the CPU's simulated path on {len(some)} images: the same class for {100 * same:.1f} %, ", end="")
    print(f"logits {apart:.2g} of the largest apart")


def _random(name: str) -> nn.Module:
    from torchvision import models

    network = models.get_model(name, weights=None).eval()
    for parameter in network.parameters():  # torchvision leaves some heads at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


if __name__ == "__main__":
    main()
