"""A quantized network as an ONNX file that stock runtimes run in integers.

The graph is torch's, of the prepared network. Each layer is QuantizeLinear, DequantizeLinear,
and a convolution or product of what both sides give, which runtimes fuse into one integer
kernel where the output becomes bytes too. Weights are packed at exactly their bits, in types of
few bits, or plain int8; what is not stored as int8 becomes that when a runtime loads the file.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Container, Mapping

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from tap_eval.export import unpacking
from tap_eval.export.graph import BYTES, DOMAIN, INPUT, OUTPUT, PRODUCT, Graph, graph_of
from tap_eval.export.nodes import Nodes, Weights
from tap_eval.quantization.quantizer import Allocation, LayerBits, QuantizedNetwork

_OPSET, _OPSET_OF_TWO_BITS = 21, 25
"""the first with all that is used, and the first with integers of two bits"""


def onnx_model(
    network: QuantizedNetwork,
    allocation: Allocation,
    example: Tensor,
    metadata: Mapping[str, str],
    weights: Weights = "packed",
) -> onnx.ModelProto:
    """A network that has the bits of `allocation`, for any number of images like `example` (N, C, H, W).

    Its input is called `pixels`, its output `logits`. `metadata` is what the file says of it, beside bits a layer.
    Raises `ExportMistake` for a network that torch does not export.
    """
    graph = graph_of(network.prepared, example[:1], [layer.affine for layer in network.layers])
    two_bits = weights == "native" and any(2 in _each(bits) for bits in allocation.weights)
    model = _exported(graph, example, _OPSET_OF_TWO_BITS if two_bits else _OPSET)
    nodes = Nodes(model.graph, graph.calls, network, allocation, weights)
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == BYTES:
            nodes.put_bytes(node, graph.affines[node.attributes["place"].as_int()])
        elif node.domain == DOMAIN and node.op_type == PRODUCT:
            nodes.put_layer(node)
    names = [layer.name for layer in network.prepared.layers]
    model.metadata_props.update(metadata)
    model.metadata_props["weight_bits"] = json.dumps(dict(zip(names, allocation.weights, strict=True)))
    model.metadata_props["activation_bits"] = json.dumps(dict(zip(names, allocation.activations, strict=True)))
    return _plain(model, {nodes.label(number) for number in graph.calls})


def _each(bits: LayerBits) -> set[int]:
    return {bits} if isinstance(bits, int) else set(bits)


def _exported(graph: Graph, example: Tensor, opset: int) -> ir.Model:
    images = example[:1].expand(2, *example.shape[1:])
    shapes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph.module, (images,), dynamic_shapes=shapes)
        found = torch.onnx.export(
            program, (), dynamo=True, opset_version=opset, input_names=[INPUT], output_names=[OUTPUT], verbose=False
        )
    assert found is not None
    return found.model


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
    else:
        del proto.opset_import[1:]
    return proto
