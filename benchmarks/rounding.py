"""How long all layers of a network take to be rounded by GPTQ, beside the nearest, and to be finished.

    pip install --no-deps efficientnet_lite_pytorch==0.1.0
    PYTHONPATH=. python benchmarks/rounding.py cifar_resnet20:32 efficientnet_lite0:224
        torchvision.resnet50:224 torchvision.vit_b_16:224

Each is a network and the side of its images. Weights are random, images noise, 16 of them for
calibration. Each network has a process of its own. With `--cpu` seconds are those of the process,
so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import built, noise, settle
from tap_eval.kept import Kept
from tap_eval.measuring.recipe import Bounds
from tap_eval.measuring.rounded import RoundedWeights
from tap_eval.measuring.threads import one_thread_each
from tap_eval.networks.collections import collected
from tap_eval.networks.resnet import CifarResNet
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.program import record
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.finishing import finish
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork

CHOICES = (2, 3, 4, 8)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", help="as torchvision.resnet50:224")
    parser.add_argument("--calibration", type=int, default=16, help="images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true", help="seconds of the process, all its threads together")
    parser.add_argument("--here", action="store_true", help="one network in this process, and JSON of it")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.here:
        print(json.dumps(_timed(chosen.networks[0], chosen.calibration, chosen.cpu)))
        return
    clock = "seconds of the process" if chosen.cpu else "seconds"
    print(f"{chosen.threads} threads, {chosen.calibration} calibration images, torch {torch.__version__}, {clock}\n")
    print(f"| | layers | weights | a pass | nearest at {', '.join(map(str, CHOICES))} | GPTQ | finishing | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for network in chosen.networks:
        options = [f"--calibration={chosen.calibration}", f"--threads={chosen.threads}", *["--cpu"] * chosen.cpu]
        done = subprocess.run(
            [sys.executable, __file__, network, *options, "--here"], stdout=subprocess.PIPE, text=True, check=True
        )
        row = json.loads(done.stdout.splitlines()[-1])
        times = " | ".join(f"{row[each]:.1f}" for each in ("pass", "nearest", "gptq", "finishing"))
        print(f"| {network} | {row['layers']} | {row['weights']:,} | {times} | {row['mib']:,.0f} |", flush=True)


@torch.no_grad()
def _timed(name: str, count: int, cpu: bool) -> dict[str, Any]:
    """Seconds of each, in the process that is asked."""
    clock = time.process_time if cpu else time.perf_counter
    network, pixels = _network(name, count)
    prepared = prepare(network, pixels[:2])
    seen = calibrate(prepared, pixels)
    row: dict[str, Any] = {
        "layers": len(prepared.layers), "weights": sum(layer.params for layer in prepared.layers),
    }  # fmt: skip
    started = clock()
    for part in pixels.split(prepared.batch):
        prepared(part)
    row["pass"] = clock() - started
    for rounding in ("nearest", "gptq"):
        rounded = RoundedWeights(
            prepared, pixels, seen, rounding, CHOICES, [name], Kept(None), Bounds().moments, lambda *_: None
        )
        started = clock()
        rounded(0, CHOICES[0])  # and all others with it
        row[rounding] = clock() - started
    quantized = QuantizedNetwork(prepared, seen, [partial(rounded, layer.index) for layer in prepared.layers])
    program = record(prepared, pixels[:1].expand(prepared.batch, *pixels.shape[1:]).contiguous())
    bits = tuple(CHOICES[layer.index % len(CHOICES)] for layer in prepared.layers)
    started = clock()
    with one_thread_each():
        dampings = [rounded.damping(index, each) for index, each in enumerate(bits)]
        finish(quantized, program, pixels, Allocation(bits, (8,) * len(bits)), dampings, Bounds().moments)
    row["finishing"] = clock() - started
    return row | {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def _network(name: str, count: int) -> tuple[nn.Module, Tensor]:
    """With random weights, its norms settled, and noise (N, 3, S, S) of the side that `name` ends with."""
    what, _, side = name.rpartition(":")
    pixels = noise(count, int(side), 1).pixels
    network: nn.Module
    if what.startswith("cifar_resnet"):
        network = CifarResNet(int(what.removeprefix("cifar_resnet")))
    else:
        other = collected(what, pretrained=False)
        network = other.network if other else built(what, int(side))
    settle(network.eval(), pixels)
    return network, pixels


if __name__ == "__main__":
    main()
