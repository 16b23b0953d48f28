"""Whether ONNX Runtime computes from a file what its network computes, judged step by step on equal inputs.

Two correct ways to compute a network differ by single roundings, after which everything differs
a little: outputs cannot tell that from a fault. So the bytes that ONNX Runtime makes of a value
take the place of those of the simulated path, and have to be the nearest to what the simulated
path makes of the bytes before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as refusals
from torch import Tensor
from torch.nn import functional as F

from tap_eval.export.graph import INPUT, OUTPUT, bytes_name, labels_of, names_of, recorded, unpadded
from tap_eval.export.nodes import ENOUGH
from tap_eval.mistake import ExportMistake
from tap_eval.preparing.program import Program, Step, Value, bind
from tap_eval.quantization.agreement import NOISE, recorded_otherwise
from tap_eval.quantization.integer import saturates
from tap_eval.quantization.quantizer import Affine, QuantizedNetwork

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


class _Otherwise(Exception):
    """Where something else is computed."""


@torch.inference_mode()
def check(model: onnx.ModelProto, network: QuantizedNetwork, images: Tensor) -> None:
    """Holds `model` against `network`, of which it was made and which has the same bits, on images (N, C, H, W).

    Raises `ExportMistake` when the file is not valid, or ONNX Runtime computes something else from it.
    """
    program = recorded(network.prepared, images[:1].expand(min(network.prepared.batch, len(images)), -1, -1, -1))
    wholes = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    shown = [name for name in dict.fromkeys(wholes) if ":" in name]
    following = _Following(network, bind(program, network.layers), network.rounded_in(program), _whole_biases(model))
    try:
        onnx.checker.check_model(model, full_check=True)
        plain, watched = session(model), session(_showing(model, shown))
        for part in images.split(program.batch):
            padded = program.padded(part)
            if place := recorded_otherwise(network.prepared, program, padded):
                raise _Otherwise(f"{place}, as its steps were recorded")
            names, given = [OUTPUT, *shown], {INPUT: padded.numpy()}
            found = dict(zip(names, map(torch.from_numpy, watched.run(names, given)), strict=True))
            wanted = following.logits(padded, found)
            if _apart(found[OUTPUT], wanted) > NOISE:
                raise _Otherwise("the logits")
            (logits,) = map(torch.from_numpy, plain.run([OUTPUT], given))
            if _apart(logits, wanted) > NOISE and _spread(logits - wanted) > _ALIKE * _spread(wanted):
                raise _Otherwise("the logits, where it fuses more")
    except _REFUSALS as fault:
        raise ExportMistake(
            f"ONNX Runtime {onnxruntime.__version__} does not take the file ({' '.join(str(fault).split())[:200]}): "
            "try another version of it, or export to another format."
        ) from fault
    except _Otherwise as place:
        raise ExportMistake(
            f"ONNX Runtime {onnxruntime.__version__} computes something else from the file than the network does, "
            f"first in {place}: try another version of it, or export to another format."
        ) from None


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


@dataclass(frozen=True)
class _WholeBias:
    """A bias of int32."""

    real: Tensor
    """what it stands for (O,), float64"""
    off: Tensor
    """by how much that may be another number than the network's (O,)"""


def _whole_biases(model: onnx.ModelProto) -> dict[str, _WholeBias]:
    """By the names of the layers' nodes."""
    makers = {output: node for node in model.graph.node for output in node.output}
    readers = {value: node for node in model.graph.node for value in node.input}
    constants = {each.name: each for each in model.graph.initializer}

    def constant(name: str) -> Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(constants[name]).copy())

    found = {}
    for node in model.graph.node:
        maker = makers.get(node.input[2]) if node.name and len(node.input) > 2 else None
        if maker is not None:
            scale, other = (constant(each) for each in makers[maker.input[1]].input)
            then = readers[node.output[0]]
            while then.op_type != "QuantizeLinear":
                then = readers[then.output[0]]
            unit, step = (scale * other).double(), constant(then.input[1])
            off = 1.001 * torch.minimum(unit / 2, ENOUGH * step)
            found[node.name] = _WholeBias(constant(maker.input[0]) * unit, off)
    return found


class _Following:
    """The simulated path, which goes on with the bytes that ONNX Runtime has."""

    def __init__(
        self,
        network: QuantizedNetwork,
        program: Program,
        values: Mapping[Value, Affine],
        biases: Mapping[str, _WholeBias],
    ) -> None:
        self.network = network
        self.program = program
        self.values = values
        self.biases = biases
        self.labels = labels_of(program, network.prepared)
        self.makers = {step.value: step for step in program.steps}
        self.names = names_of(program)

    def logits(self, images: Tensor, shown: Mapping[str, Tensor]) -> Tensor:
        """(N, classes), from the bytes that are shown; raises `_Otherwise`."""
        known = self.program.begin(images)
        for step in self.program.steps:
            if step.layer is None:
                step.run(known)
            else:
                step.put(self._layer(step, known, shown), known)
            if affine := self.values.get(step.value):
                known[step.value] = self._real(known[step.value], step.value, affine, shown, f"{step.value}")
        return known[self.program.logits]

    def _layer(self, step: Step, known: Mapping[Value, Tensor], shown: Mapping[str, Tensor]) -> Tensor:
        assert step.layer is not None
        assert step.call is not None
        layer, label = self.network.layers[step.layer], self.labels[step.call]
        value, pads = unpadded(step, self.makers, layer.layer)
        x = known[step.args[0]]
        if layer.affine is not None:
            rows, columns = x.shape[-2:] if x.dim() == 4 else (0, 0)
            left, right, above, below = pads
            own = x[..., above : rows - below, left : columns - right] if any(pads) else x
            x = F.pad(self._real(own, value, layer.affine, shown, f"the input of {label}"), pads)
        y = layer(x)
        if label in self.biases and layer.weight is not None:
            bias = self.biases[label]
            off = bias.real - layer.weight.bias
            if bool((off.abs() > bias.off).any()):
                raise _Otherwise(f"the bias of {label}")
            y += (off.view(-1, 1, 1) if y.dim() == 4 else off).float()
        return y

    def _real(self, x: Tensor, value: Value, affine: Affine, shown: Mapping[str, Tensor], place: str) -> Tensor:
        """What the bytes of a value stand for, which have to be the nearest to `x`."""
        whole = shown[bytes_name(self.names[value], affine)].float()
        real = x.double() / affine.scale + affine.zero_point
        if whole.shape != x.shape:
            raise _Otherwise(place)
        off = (whole - real.clamp(0, 2**affine.bits - 1)).abs()
        if not bool((off <= 0.5 + NOISE * (real - affine.zero_point).abs().max()).all()):
            raise _Otherwise(place)
        return (whole - affine.zero_point) * affine.scale


def _apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, in parts of the largest number."""
    if got.shape != want.shape:
        return torch.inf
    return float((got - want).abs().nan_to_num(torch.inf).max() / want.abs().max().clamp_min(1e-30))


def _spread(logits: Tensor) -> float:
    return float(logits.double().var(1).mean().sqrt())
