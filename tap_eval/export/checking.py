"""Whether ONNX Runtime computes from a file what its network computes, judged layer by layer on equal inputs.

Two correct ways to compute a network differ by single roundings, after which everything differs
a little: outputs cannot tell that from a fault. So the bytes that each layer reads in ONNX
Runtime take the place of those of the simulated path, and have to be the nearest to what the
simulated path makes of the bytes before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx
import onnxruntime
import torch
from torch import Tensor
from torch.nn import functional as F

from tap_eval.export.graph import INPUT
from tap_eval.export.nodes import ENOUGH
from tap_eval.mistake import ExportMistake
from tap_eval.quantization.agreement import NOISE
from tap_eval.quantization.integer import saturates
from tap_eval.quantization.quantizer import Affine, QuantizedLayer, QuantizedNetwork

_ALIKE = 0.25
"""of the spread of logits: single roundings make less, a fault more"""


class _Otherwise(Exception):
    """Where something else is computed."""


@dataclass(frozen=True)
class _Read:
    """What a call of a layer reads in a file."""

    value: str
    """its bytes"""
    pads: tuple[int, ...]
    """zeros that a convolution adds: left, right, above and below"""
    bias: Tensor | None
    """what an int32 bias stands for (O,), float32"""
    off: float
    """by how much that may be another than the network's"""


@torch.inference_mode()
def check(model: onnx.ModelProto, network: QuantizedNetwork, images: Tensor) -> None:
    """Holds `model` against `network`, of which it was made and which has the same bits, on images (N, C, H, W).

    Raises `ExportMistake` when the file is not valid, or ONNX Runtime computes something else from it.
    """
    onnx.checker.check_model(model, full_check=True)
    read = _read(model)
    plain, watched = session(model), session(_showing(model, [each.value for each in read.values()]))
    names = [output.name for output in watched.get_outputs()]
    for part in images.split(network.prepared.batch):
        given = {INPUT: part.numpy()}
        known = dict(zip(names, map(torch.from_numpy, watched.run(None, given)), strict=True))
        (logits,) = map(torch.from_numpy, plain.run(None, given))
        try:
            wanted = _followed(network, part, {name: known[each.value] for name, each in read.items()}, read)
            if _apart(known[names[0]], wanted) > NOISE:
                raise _Otherwise("the logits")
            if _apart(logits, wanted) > NOISE and _spread(logits - wanted) > _ALIKE * _spread(wanted):
                raise _Otherwise("the logits, where it fuses more")
        except _Otherwise as place:
            raise ExportMistake(
                f"ONNX Runtime {onnxruntime.__version__} computes something else from the file than the network does, "
                f"first in {place}: take --out with another suffix, or another version of it."
            ) from None


def session(model: onnx.ModelProto, threads: int = 0) -> onnxruntime.InferenceSession:
    """A file opened on the CPU, for so many threads, 0 for as many as there are cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if saturates():  # as it does without, where bytes times large weights are added in 16 bits
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _read(model: onnx.ModelProto) -> dict[str, _Read]:
    """What calls of layers read, by the names of their nodes; nothing of layers that read floats."""
    makers = {output: node for node in model.graph.node for output in node.output}
    readers = {value: node for node in model.graph.node for value in node.input}
    constants = {each.name: each for each in model.graph.initializer}

    def constant(name: str) -> Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(constants[name]).copy())

    found = {}
    for node in model.graph.node:
        maker = makers.get(node.input[0]) if node.name else None
        if maker is not None and maker.op_type == "DequantizeLinear":
            above, left, below, right = next((each.ints for each in node.attribute if each.name == "pads"), (0,) * 4)
            bias, off = None, 0.0
            if len(node.input) > 2 and (held := makers.get(node.input[2])):
                scales = [constant(scale) for scale in makers[held.input[1]].input]
                bias, then = constant(held.input[0]) * (scales[0] * scales[1]), readers[node.output[0]]
                while then.op_type != "QuantizeLinear":
                    then = readers[then.output[0]]
                off = 1.01 * ENOUGH * float(constant(then.input[1]))
            found[node.name] = _Read(maker.input[0], (left, right, above, below), bias, off)
    return found


def _showing(model: onnx.ModelProto, values: Sequence[str]) -> onnx.ModelProto:
    """The model with bytes among its outputs."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    whole = onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=onnx.TensorProto.UINT8))
    made.graph.output.extend(onnx.ValueInfoProto(name=value, type=whole) for value in dict.fromkeys(values))
    return made


def _followed(
    network: QuantizedNetwork, images: Tensor, known: Mapping[str, Tensor], read: Mapping[str, _Read]
) -> Tensor:
    """The logits of the simulated path, whose layers read the bytes that are known."""
    calls = Counter[int]()

    def call(index: int, layer: QuantizedLayer, x: Tensor) -> Tensor:
        name, again = network.prepared.layers[index].name, calls[index]
        calls[index] += 1
        label = f"{name}:{again}" if again else name
        if label not in known or layer.affine is None:
            return layer(x)
        pads = [each - own for each, own in zip(read[label].pads, _padding(layer), strict=True)]
        whole = F.pad(known[label].float() - layer.affine.zero_point, pads)
        if not _is_nearest(whole, x, layer.affine):
            raise _Otherwise(f"the input of {label}")
        y = layer(whole * layer.affine.scale)
        bias = read[label].bias
        if bias is not None and layer.weight is not None:
            off = bias - layer.weight.bias
            if float(off.abs().max()) > read[label].off:
                raise _Otherwise(f"the bias of {label}")
            y += off.view(-1, 1, 1) if y.dim() == 4 else off
        return y

    layers = [partial(call, index, layer) for index, layer in enumerate(network.layers)]
    return network.prepared(images, layers)


def _padding(layer: QuantizedLayer) -> tuple[int, ...]:
    rows, columns = getattr(layer.layer, "padding", (0, 0))
    return columns, columns, rows, rows


def _is_nearest(whole: Tensor, x: Tensor, affine: Affine) -> bool:
    """Whether integers, less the zero point, are those that stand for `x`."""
    if whole.shape != x.shape:
        return False
    low, high = -affine.zero_point, 2**affine.bits - 1 - affine.zero_point
    real = x.double() / affine.scale
    return bool(((whole - real.clamp(low, high)).abs() <= 0.5 + NOISE * real.abs().max()).all())


def _apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, in parts of the largest number."""
    if got.shape != want.shape:
        return torch.inf
    return float((got - want).abs().nan_to_num(torch.inf).max() / want.abs().max().clamp_min(1e-30))


def _spread(logits: Tensor) -> float:
    return float(logits.double().var(1).mean().sqrt())
