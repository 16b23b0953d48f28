"""The integer path beside ONNX Runtime's own W8A8 and eager float32, one after the other in one process.

    pip install onnx onnxruntime
    python benchmarks/peers.py cifar_resnet20 --weights data/resnet20-cifar10.pt
        --images parquet:data/cifar10-val.parquet --count 512 --batches 32,128
    PYTHONPATH=. python benchmarks/peers.py efficientnet_lite0
        --images parquet:data/imagenet-sample-val.parquet --count 48 --batches 1,8

ONNX Runtime gets the network as PyTorch exports it, made ready by its own pre-processing and
quantized by its own `quantize_static` with the same 16 calibration images: weights int8, a
scale a channel, activations uint8, every operator that it knows, additions and pooling too.
One thread each unless `--threads` says otherwise; with one, seconds are those of the process,
so that other work on the machine counts less. Ratios are medians over rounds of all of them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from tap_agent.paths import cache_folder
from tap_eval.allocation.choices import uniform
from tap_eval.images.sources import open_source
from tap_eval.measuring.recorder import Recorder
from tap_eval.networks.load import load_network
from tap_eval.preparing.prepare import prepare
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.integer import IntegerNetwork, KeptWeights
from tap_eval.quantization.quantizer import QuantizedNetwork
from tap_eval.quantization.sums import Sums, ranges

CALIBRATION = 16
PEERS = {"QDQ": QuantFormat.QDQ, "QOperator": QuantFormat.QOperator}

Run = Callable[[], Tensor]
"""Gives the logits of all images."""


def main() -> None:
    """Prints a Markdown table."""
    parser = arguments(__doc__)
    parser.add_argument("--batches", default="1,8", help="of ONNX Runtime, each tried")
    parser.add_argument("--integer-batches", help="of the integer path, each tried; by default what a run would take")
    parser.add_argument("--bits", default="4,8", help="of the integer path's weights, each tried")
    parser.add_argument("--sums", default="float,int8", help="between layers of the integer path, each tried")
    parser.add_argument("--eager-batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)

    network, pixels, calibration = opened(chosen)

    def eager() -> Tensor:
        with torch.inference_mode():
            return torch.cat([network(part) for part in pixels.split(chosen.eager_batch)])

    runs: dict[str, Run] = {"eager float32": eager}
    sums = chosen.sums.split(",")
    runs |= _integers(network, pixels, calibration, chosen.integer_batches, _numbers(chosen.bits), sums)
    with tempfile.TemporaryDirectory() as folder:
        runs |= _peers(network, pixels, calibration, Path(folder), _numbers(chosen.batches), chosen.threads)
        clock = time.process_time if chosen.threads == 1 else time.perf_counter
        logits, seconds = alternating(runs, chosen.rounds, clock)
    best = min(
        (name for name in runs if name.startswith("ONNX Runtime, W8A8")),
        key=lambda name: statistics.median(seconds[name]),
    )
    expected = logits["eager float32"].argmax(1)
    print(f"{chosen.network}, {len(pixels):,} images, {chosen.threads} threads, torch {torch.__version__}, ", end="")
    print(f"onnxruntime {onnxruntime.__version__}; the best of its W8A8: {best}\n")
    print("| | images a second | times ONNX Runtime's W8A8 | times eager | class of eager |\n|---|---|---|---|---|")
    for name in runs:
        ratios = [f"{_ratio(seconds[other], seconds[name]):.2f}" for other in (best, "eager float32")]
        same = float((logits[name].argmax(1) == expected).double().mean())
        speed = len(pixels) / statistics.median(seconds[name])
        print(f"| {name} | {speed:,.1f} | {' | '.join(ratios)} | {100 * same:.1f} % |")


def arguments(described: str | None) -> argparse.ArgumentParser:
    """Those of every benchmark beside ONNX Runtime."""
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", required=True)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    return parser


def opened(chosen: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, the images that are asked for, and those after them that it is calibrated on."""
    loaded = load_network(chosen.network, chosen.weights, cache_folder())
    pixels = open_source(chosen.images).decode(range(chosen.count + CALIBRATION), loaded.transform).pixels
    return loaded.network, pixels[: chosen.count], pixels[chosen.count :]


def _integers(
    network: nn.Module, pixels: Tensor, calibration: Tensor, batches: str | None, bits: list[int], sums: list[str]
) -> dict[str, Run]:
    prepared = prepare(network, pixels[:2])
    seen = calibrate(prepared, calibration)
    runs: dict[str, Run] = {}

    recorded = Recorder(prepared, pixels)
    for batch in _numbers(batches) if batches else [prepared.batch]:
        carried = Sums(ranges(recorded(batch), prepared.modules, calibration), recorded)
        for each, kind in itertools.product(bits, sums):
            simulated = QuantizedNetwork(prepared, seen, sums=carried if kind == "int8" else None)
            fast = IntegerNetwork(simulated, recorded(batch), (8,) * len(prepared.layers), KeptWeights(2**31))
            fast.choose(uniform(prepared.layers, each))
            runs[f"integer path, W{each}A8, {kind} sums, batches of {batch}"] = lambda fast=fast: fast.logits(pixels)
    return runs


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands the calibration images over one by one."""

    def __init__(self, pixels: Tensor) -> None:
        self._images: Iterator[Tensor] = iter(pixels.split(1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._images, None)
        return None if image is None else {"pixels": image.numpy()}


def _peers(
    network: nn.Module, pixels: Tensor, calibration: Tensor, folder: Path, batches: list[int], threads: int
) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for name, file in runtime_files(network, calibration, folder).items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for batch in batches:
            runs[f"ONNX Runtime, {name}, batches of {batch}"] = partial(answers, session, pixels, batch)
    return runs


def runtime_files(network: nn.Module, calibration: Tensor, folder: Path) -> dict[str, Path]:
    """The network in float32, and quantized by ONNX Runtime in both of its layouts."""
    plain, ready = folder / "plain.onnx", folder / "ready.onnx"
    torch.onnx.export(
        network, (calibration[:2],), plain, input_names=["pixels"], output_names=["logits"], opset_version=17,
        dynamic_axes={"pixels": {0: "batch"}, "logits": {0: "batch"}},
        dynamo=False,  # whose graphs the runtime's quantizer knows best
    )  # fmt: skip
    quant_pre_process(str(plain), str(ready))
    files = {"float32": ready}
    for name, layout in PEERS.items():
        files[f"W8A8 ({name})"] = folder / f"{name}.onnx"
        quantize_static(
            str(ready), str(files[f"W8A8 ({name})"]), _Reader(calibration), quant_format=layout, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return files


def answers(session: onnxruntime.InferenceSession, pixels: Tensor, batch: int) -> Tensor:
    """(N, classes), in batches."""
    parts = [session.run(None, {"pixels": part.numpy()})[0] for part in pixels.split(batch)]
    return torch.from_numpy(np.concatenate(parts))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _ratio(others: list[float], mine: list[float]) -> float:
    return statistics.median(other / own for other, own in zip(others, mine, strict=True))


def alternating(
    runs: Mapping[str, Run], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """What each gives, and its seconds in each round, after one to warm up."""
    logits, seconds = {name: run() for name, run in runs.items()}, {name: list[float]() for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return logits, seconds


if __name__ == "__main__":
    main()
