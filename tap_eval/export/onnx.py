"""A quantized network as an ONNX file that stock runtimes run in integers.

The graph is torch's, of the prepared network. Each layer is QuantizeLinear, DequantizeLinear,
and a convolution or product of what both sides give, which runtimes fuse into one integer
kernel where the output becomes bytes too. Weights are packed at exactly their bits, in types of
few bits, or plain int8; what is not stored as int8 becomes that when a runtime loads the file.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Container, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from tap_eval.export import unpacking
from tap_eval.export.checking import check
from tap_eval.export.extra import Weights
from tap_eval.export.graph import BYTES, DOMAIN, INPUT, OUTPUT, PRODUCT, Graph, graph_of
from tap_eval.export.nodes import Nodes
from tap_eval.export.reading import KEYS, MADE, described
from tap_eval.export.remaining import Remaining, remaining
from tap_eval.mistake import ExportMistake
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork, distinct
from tap_eval.scratch import scratch

__all__ = ["described", "onnx_model", "write"]
_OPSET, _OPSET_OF_TWO_BITS = 21, 25
"""the first with all that is used, and the first with integers of two bits"""
_FLOAT = ("Conv", "Gemm", "MatMul")
"""operators that multiply floats"""


def write(
    path: Path,
    network: QuantizedNetwork,
    allocation: Allocation,
    images: Tensor,
    metadata: Mapping[str, str],
    weights: Weights = "packed",
    *,
    strict: bool = False,
) -> Remaining:
    """Writes a network that has the bits of `allocation` to `path`, once ONNX Runtime has given its answers.

    They are compared on `images` (N, C, H, W), 64 of which are enough. Gives what is in float32. Raises `ExportMistake`
    where they differ, for a network that torch does not export, and if `strict` where anything is in float32.
    """
    model = onnx_model(network, allocation, images, metadata, weights)
    check(model, network, images)
    left = remaining(network).multiplied(multiplied_in_float(model), f"ONNX Runtime {onnxruntime.__version__}")
    if strict:
        left.refuse(path.name)
    path.write_bytes(model.SerializeToString())
    return left


def multiplied_in_float(model: onnx.ModelProto) -> list[str]:
    """The layers whose products ONNX Runtime makes of floats on the CPU, although weights and inputs are integers.

    What it makes of integers has another name or another operator in the graph that it runs.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # before layouts change
    with scratch() as folder:
        options.optimized_model_filepath = str(folder / "run.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        run = onnx.load(options.optimized_model_filepath)
    own = {node.name for node in model.graph.node if node.name}
    return [node.name for node in run.graph.node if node.name in own and node.op_type.removeprefix("Fused") in _FLOAT]


def onnx_model(
    network: QuantizedNetwork,
    allocation: Allocation,
    example: Tensor,
    metadata: Mapping[str, str],
    weights: Weights = "packed",
) -> onnx.ModelProto:
    """A network that has the bits of `allocation`, for any number of images like `example` (N, C, H, W).

    Its input is called `pixels`, its output `logits`. `metadata` is what the file says of it, beside
    bits a layer. Raises `ExportMistake` for a network that torch does not export.
    """
    graph = graph_of(network, example[:1])
    two_bits = weights == "native" and any(2 in distinct(bits) for bits in allocation.weights)
    model = _exported(graph, example, _OPSET_OF_TWO_BITS if two_bits else _OPSET)
    for constant in list(model.graph.initializers):
        model.graph.initializers[constant].name = graph.names.get(constant, f"{MADE}{constant}")
    nodes = Nodes(model.graph, graph.calls, network, allocation, weights)
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == BYTES:
            nodes.put_bytes(node, graph.bytes[node.attributes["place"].as_int()])
        elif node.domain == DOMAIN and node.op_type == PRODUCT:
            nodes.put_layer(node)
    model.metadata_props.update(metadata)
    names = [layer.name for layer in network.prepared.layers]
    for key, bits in zip(KEYS, (allocation.weights, allocation.activations), strict=True):
        model.metadata_props[key] = json.dumps(dict(zip(names, bits, strict=True)))
    return _plain(model, {call.label for call in graph.calls.values()})


def _exported(graph: Graph, example: Tensor, opset: int) -> ir.Model:
    images = example[:1].expand(2, *example.shape[1:])
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(graph.module, (images,), dynamic_shapes=shapes)
            found = torch.onnx.export(
                program, (), dynamo=True, opset_version=opset, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
    except Exception as error:  # of torch's exporter, which has many
        raise ExportMistake(
            f"torch does not export the network as ONNX{_why(error)}: export another format."
        ) from error
    assert found is not None
    return found.model


def _why(error: BaseException) -> str:
    """What the first cause of an error says, above all which operator ONNX lacks."""
    while error.__cause__:
        error = error.__cause__
    lacking = re.search(r"op='([^']+)'", str(error))
    return f", which has no {lacking[1]}" if lacking else f" ({' '.join(str(error).split())[:200]})"


def _plain(model: ir.Model, names: Container[str]) -> onnx.ModelProto:
    """Without what the exporter notes of each node, and with the names of layers' nodes alone."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    for made in proto.graph.node:
        if made.name not in names:
            made.ClearField("name")
    if any(node.op_type == unpacking.NAME for node in proto.graph.node):
        proto.functions.append(unpacking.unpack())
    opsets = [each for each in proto.opset_import if each.domain == "" or proto.functions]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
    return proto
