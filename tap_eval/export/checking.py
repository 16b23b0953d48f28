"""Whether ONNX Runtime computes from a file what its network computes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as refusals
from torch import Tensor

from tap_eval.export.following import apart, computed_otherwise
from tap_eval.export.graph import INPUT, OUTPUT
from tap_eval.export.nodes import ENOUGH
from tap_eval.mistake import ExportMistake
from tap_eval.quantization.agreement import NOISE
from tap_eval.quantization.integer import saturates
from tap_eval.quantization.quantizer import QuantizedNetwork

_ALIKE = 0.25
"""of the spread of logits: single roundings make less, a fault in a kernel more"""
_REFUSALS = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    refusals.Fail,
    refusals.InvalidArgument,
    refusals.InvalidGraph,
    refusals.NotImplemented,
    refusals.RuntimeException,
)
"""what is raised of a file that is not valid, or that ONNX Runtime does not run"""


@torch.inference_mode()
def check(model: onnx.ModelProto, network: QuantizedNetwork, images: Tensor) -> None:
    """Holds `model` against `network`, of which it was made and which has the same bits, on images (N, C, H, W).

    Raises `ExportMistake` when the file is not valid, or ONNX Runtime computes something else from it.
    """
    wholes = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    shown = [name for name in dict.fromkeys(wholes) if ":" in name]
    fused: list[bool] = []

    def run(padded: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        names, given = [OUTPUT, *shown], {INPUT: padded.numpy()}
        found = dict(zip(names, map(torch.from_numpy, watched.run(names, given)), strict=True))
        (logits,) = map(torch.from_numpy, plain.run([OUTPUT], given))
        fused.append(apart(logits, found[OUTPUT]) <= NOISE or _alike(logits, found[OUTPUT]))
        return found[OUTPUT], found

    try:
        onnx.checker.check_model(model, full_check=True)
        plain, watched = session(model), session(_showing(model, shown))
        biases = _whole_biases(model, network)
        place = next(
            (f"the bias of {label}" for label, (off, most) in biases.items() if (off.abs() > most).any()), None
        )
        place = place or computed_otherwise(
            run, network, images, {label: off.float() for label, (off, _) in biases.items()}
        )
    except _REFUSALS as fault:
        raise ExportMistake(
            f"ONNX Runtime {onnxruntime.__version__} does not take the file ({' '.join(str(fault).split())[:200]}): "
            "try another version of it, or export to another format."
        ) from fault
    if place or not all(fused):
        raise ExportMistake(
            f"ONNX Runtime {onnxruntime.__version__} computes something else from the file than the network does, "
            f"first in {place or 'the logits, where it fuses more'}: try another version of it, or export to another "
            "format."
        )


def session(model: onnx.ModelProto, threads: int = 0) -> onnxruntime.InferenceSession:
    """A file opened on the CPU, for so many threads, 0 for as many as there are cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if saturates():  # as it does without, where bytes times large weights are added in 16 bits
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _showing(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """The model with bytes among its outputs."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    whole = onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=onnx.TensorProto.UINT8))
    made.graph.output.extend(onnx.ValueInfoProto(name=name, type=whole) for name in names)
    return made


def _whole_biases(model: onnx.ModelProto, network: QuantizedNetwork) -> dict[str, tuple[Tensor, Tensor]]:
    """By how much biases of int32 are other numbers than the network's (O,), and may be, by the names of nodes.

    They are just these but for weights in types of few bits, whose products are coarser units.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    readers = {value: node for node in model.graph.node for value in node.input}
    constants = {each.name: each for each in model.graph.initializer}

    def constant(name: str) -> Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(constants[name]).copy())

    layers = {layer.name: own for layer, own in zip(network.prepared.layers, network.layers, strict=True)}
    found = {}
    for node in model.graph.node:
        maker = makers.get(node.input[2]) if node.name and len(node.input) > 2 else None
        if maker is not None:
            scale, other = (constant(each) for each in makers[maker.input[1]].input)
            then = readers[node.output[0]]
            while then.op_type != "QuantizeLinear":
                then = readers[then.output[0]]
            unit, step = (scale * other).double(), constant(then.input[1])
            most = 1.001 * torch.minimum(unit / 2, ENOUGH * step)
            weight = (layers.get(node.name) or layers[node.name.rpartition(":")[0]]).weight
            assert weight is not None
            found[node.name] = constant(maker.input[0]) * unit - weight.bias, most
    return found


def _alike(logits: Tensor, others: Tensor) -> bool:
    """Whether they differ by no more than single roundings make of them."""
    return _spread(logits - others) <= _ALIKE * _spread(others)


def _spread(logits: Tensor) -> float:
    return float(logits.double().var(1).mean().sqrt())
