"""Exported files in ONNX Runtime, beside its float32 and its own W8A8 of the same network.

    PYTHONPATH=. python benchmarks/exported.py cifar_resnet20 --weights data/resnet20-cifar10.pt
        --images parquet:data/cifar10-val.parquet --count 512
    PYTHONPATH=. python benchmarks/exported.py efficientnet_lite0
        --images parquet:data/imagenet-sample-val.parquet --count 48
    PYTHONPATH=. python benchmarks/exported.py timm.models.vision_transformer:vit_tiny_patch16_224
        --images parquet:data/imagenet-sample-val.parquet --count 24

Weights are rounded to the nearest, since neither time nor size depends on how; 2.5 bits are 2 and 3
in turn, layer by layer. "Values" are the bytes that `tap_eval.allocation.size` counts; the rest of
a file is its graph. "In float" are the convolutions and linear layers that ONNX Runtime, once it
has optimized the graph, multiplies in float32. One thread; milliseconds are those of the process,
medians over rounds of all files one after the other.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime
import torch
from torch import Tensor

from benchmarks.peers import alternating, answers, arguments, opened, runtime_files
from tap_eval.allocation.size import FLOAT, packed_size
from tap_eval.export.onnx import write
from tap_eval.measuring.recorder import Recorder
from tap_eval.preparing.prepare import prepare
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.integer import IntegerNetwork, KeptWeights
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork
from tap_eval.quantization.sums import Sums, ranged, ranges

PRODUCTS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


def main() -> None:
    """Prints a Markdown table."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", default="8,4,2.5", help="of weights, each tried")
    parser.add_argument("--sums", default="float,int8", help="between layers, each tried")
    parser.add_argument("--stored", default="packed", help="packed, native or int8, each tried")
    parser.add_argument("--batch", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1)

    network, pixels, calibration = opened(chosen)
    with torch.inference_mode():
        expected = torch.cat([network(part) for part in pixels.split(16)]).argmax(1)
    prepared = prepare(network, pixels[:2])
    seen = calibrate(prepared, calibration)

    recorded = Recorder(prepared, pixels)
    program = recorded(max(prepared.batch, 8))
    between = Sums(ranges(program, prepared.modules, calibration), recorded)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {f"ONNX Runtime, {form}": file for form, file in runtime_files(network, calibration, folder).items()}
        values: dict[str, int] = {}
        integers: dict[str, Tensor] = {}
        lists = (option.split(",") for option in (chosen.bits, chosen.stored, chosen.sums))
        for bits, stored, sums in itertools.product(*lists):
            row = f"exported, W{bits}A8, {stored}, sums in {sums}"
            quantized = QuantizedNetwork(prepared, seen, sums=between if sums == "int8" else None)
            allocation = _allocation(float(bits), len(prepared.layers))
            quantized.choose(allocation)
            files[row] = folder / f"{len(files)}.onnx"
            write(files[row], quantized, allocation, pixels[:64], {}, stored)
            of_sums = ranged(program if quantized.sums else None, prepared)
            values[row] = packed_size(prepared.layers, allocation, FLOAT * prepared.left, of_sums).total
            fast = IntegerNetwork(quantized, program, allocation.activations, KeptWeights(2**31))
            fast.choose(allocation)
            integers[row] = fast.logits(pixels).argmax(1)
        files_opened = {row: _opened(file, folder / "optimized.onnx") for row, file in files.items()}
        runs = {row: partial(answers, each.session, pixels, chosen.batch) for row, each in files_opened.items()}
        logits, seconds = alternating(runs, chosen.rounds, time.process_time)
        print(
            f"{chosen.network}, {len(pixels):,} images in batches of {chosen.batch}, torch {torch.__version__}, ",
            end="",
        )
        print(f"onnxruntime {onnxruntime.__version__}\n")
        print("| | ms an image | bytes | values | load, ms | in float | class of float32 | class of the integer path |")
        print("|---|---|---|---|---|---|---|---|")
        for row, each in files_opened.items():
            ms = 1e3 * statistics.median(seconds[row]) / len(pixels)
            same = [_same(logits[row], classes) for classes in (expected, integers.get(row))]
            sizes = [f"{size:,}" if size else "" for size in (files[row].stat().st_size, values.get(row, 0))]
            print(f"| {row} | {ms:.2f} | {' | '.join(sizes)} | {1e3 * each.seconds:.0f} | {each.floats} | ", end="")
            print(f"{' | '.join(same)} |")


def _allocation(bits: float, layers: int) -> Allocation:
    """`bits`, or the whole numbers around it in turn."""
    return Allocation(tuple((math.floor, math.ceil)[place % 2](bits) for place in range(layers)), (8,) * layers)


def _same(logits: Tensor, classes: Tensor | None) -> str:
    return "" if classes is None else f"{100 * float((logits.argmax(1) == classes).double().mean()):.1f} %"


class Opened(NamedTuple):
    """A file in ONNX Runtime."""

    session: onnxruntime.InferenceSession
    seconds: float
    """that it took to load"""
    floats: int
    """products that are left in float32"""


def _opened(file: Path, optimized: Path) -> Opened:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    seconds = []
    for _ in range(5):
        started = time.process_time()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        seconds.append(time.process_time() - started)
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return Opened(session, statistics.median(seconds), _floats(onnx.load(optimized).graph))


def _floats(graph: onnx.GraphProto) -> int:
    """Products with weights, also with those that are made numbers of int8 each time."""
    weights = {each.name for each in graph.initializer}
    weights |= {
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }
    return sum(node.op_type in PRODUCTS and node.input[1] in weights for node in graph.node)


if __name__ == "__main__":
    main()
