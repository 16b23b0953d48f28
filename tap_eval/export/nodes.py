"""Standard ONNX operators in the place of layers, and of values that become bytes.

A layer is a convolution or product of what two DequantizeLinear give, of bytes and of int8
weights; where its output becomes bytes too, runtimes fuse all of it into one integer kernel,
with a bias of int32. Weights become int8 when a file is loaded.

Integers of few bits are raised by a power of two, and scales are smaller by as much, so that
weights are the same: the product of both scales is then the unit of which the quantizer makes
each bias a whole number. Types of few bits have no room for it, and a bias may be none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from tap_eval.export import unpacking
from tap_eval.export.extra import Weights
from tap_eval.export.graph import Bytes, Call
from tap_eval.export.packing import packed
from tap_eval.mistake import ExportMistake
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork, QuantizedWeight, raised

ENOUGH = 1 / 4
"""steps of the output: a bias that is further off as a whole number of units is added as a float"""
_NATIVE = {2: ml_dtypes.int2, 3: ml_dtypes.int4, 4: ml_dtypes.int4}
"""types by bits; more bits are stored as int8"""


@dataclass
class Nodes:
    """Puts them into a graph, one after the other, in the order of the graph."""

    graph: ir.Graph
    calls: Mapping[int, Call]
    network: QuantizedNetwork
    allocation: Allocation
    stored: Weights
    known: dict[str, ir.Value] = field(default_factory=dict)
    """constants, and what is computed of constants, by name"""
    place: ir.Node | None = None
    """that is replaced: others are put before it"""
    count: int = 0
    """values that are named by numbers"""

    def put_bytes(self, node: ir.Node, made: Bytes) -> None:
        """A value that becomes bytes, and numbers again."""
        self.place, affine = node, made.affine
        name = f"{made.reader}.input_scale" if made.reader else f"{made.name}.scale"
        parameters = [self._constant(name, np.float32(affine.scale)), self._byte(affine.zero_point)]
        whole = self._add("QuantizeLinear", [node.inputs[0], *parameters])
        if affine.bits < 8:
            whole = self._add("Min", [whole, self._byte(2**affine.bits - 1)])
        whole.name = made.name
        self._replace(self._add("DequantizeLinear", [whole, *parameters]))

    def _byte(self, value: int) -> ir.Value:
        return self._constant(f"byte_{value}", np.uint8(value))

    def put_layer(self, node: ir.Node) -> None:
        """A call of a layer."""
        self.place, x = node, node.inputs[0]
        call = self.calls[node.attributes["call"].as_int()]
        layer, name = self.network.layers[call.layer], self.network.prepared.layers[call.layer].name
        operator, attributes = _operator(layer.layer, call)
        inputs = [x, self._weight(call.layer, operator)]
        bias = layer.layer.bias if layer.weight is None else layer.weight.bias
        beside = bias is not None and (operator != "Conv" or call.then is not None)
        whole = self._whole_bias(call.layer) if operator != "MatMul" and call.then else None
        if whole is not None and call.then and self._off(call.layer, whole) <= ENOUGH * call.then.scale:
            inputs.append(self._dequantized_bias(call.layer, whole, x))
            beside = False
        elif bias is not None and not beside:
            inputs.append(self._constant(f"{name}.corrected_bias", bias))
        made = self._add(operator, inputs, attributes, call.label)
        if beside:
            assert bias is not None
            if operator == "Conv":  # an Add would be fused, and its bias be made whole numbers after all
                made = self._add("Sub", [made, self._constant(f"{name}.corrected_bias_negated", -bias.view(-1, 1, 1))])
            else:
                made = self._add("Add", [made, self._constant(f"{name}.corrected_bias", bias)])
        self._replace(made)

    def _whole_bias(self, index: int) -> Tensor | None:
        """The bias of a layer in integers as so many units (O,) int32."""
        weight, layer = self.network.layers[index].weight, self.network.layers[index]
        if weight is None or layer.affine is None:
            return None
        whole = (weight.bias.double() / self._units(index)).round()
        return whole.clamp(-(2**31), 2**31 - 1).to(torch.int32)

    def _off(self, index: int, whole: Tensor) -> float:
        """How far a bias is off as so many units, at most."""
        return float((whole * self._units(index) - self._quantized(index).bias).abs().max())

    def _units(self, index: int) -> Tensor:
        """The product of both scales (O,), rounded to float32 as a runtime does it, float64."""
        affine = self.network.layers[index].affine
        assert affine is not None
        return (self._scale(index) * affine.scale).double()

    def _dequantized_bias(self, index: int, whole: Tensor, x: ir.Value | None) -> ir.Value:
        """A bias of int32, as the number that it stands for; `x` is the layer's input, made of bytes."""
        name = self.network.prepared.layers[index].name
        if f"{name}.dequantized_bias" not in self.known:
            assert x is not None
            dequantize = x.producer()
            assert dequantize is not None
            units = self._add("Mul", [dequantize.inputs[1], self._constant(f"{name}.weight_scale", self._scale(index))])
            given = [self._constant(f"{name}.corrected_bias_int32", whole), units]
            self.known[f"{name}.dequantized_bias"] = self._add("DequantizeLinear", given, {"axis": 0})
        return self.known[f"{name}.dequantized_bias"]

    def _scale(self, index: int) -> Tensor:
        """Of the int8 weights (O,), float32."""
        return self._quantized(index).scale / self._raised(index)

    def _raised(self, index: int) -> Tensor:
        """By how much the int8 weights are larger than the integers, (O,) float32: a power of two."""
        bits = self._quantized(index).bits
        return torch.ones(len(bits)) if self.stored == "native" else raised(bits)

    def _quantized(self, index: int) -> QuantizedWeight:
        """The weight of a layer in integers."""
        weight = self.network.layers[index].weight
        assert weight is not None
        return weight

    def _weight(self, index: int, operator: str) -> ir.Value:
        """A layer's weight, as an operator takes it."""
        layer, name = self.network.layers[index], self.network.prepared.layers[index].name
        known = f"{name} of {operator}"
        if layer.weight is None:
            return self._constant(
                f"{name}.weight_for_{operator}", layer.layer.weight.T if operator == "MatMul" else layer.layer.weight
            )
        if known not in self.known:
            integers, scale = self._integers(index), self._constant(f"{name}.weight_scale", self._scale(index))
            zero_point, axis = self._zero_point(integers, scale), 0
            if operator == "MatMul":
                integers, axis = self._add("Transpose", [integers], {"perm": [1, 0]}), 1
            self.known[known] = self._add("DequantizeLinear", [integers, scale, zero_point], {"axis": axis})
        return self.known[known]

    def _zero_point(self, integers: ir.Value, scale: ir.Value) -> ir.Value:
        """Zeros (O,) int8, without which ONNX Runtime fuses no `Gemm`, nor anything as CPUs without VNNI need it."""
        maker = integers.producer()
        if maker is not None and maker.op_type == unpacking.NAME:
            return maker.outputs[1]
        return self._add("Cast", [self._add("Sub", [scale, scale])], {"to": ir.DataType.INT8})

    def _integers(self, index: int) -> ir.Value:
        """A layer's weights (O, ...) int8."""
        name, bits = self.network.prepared.layers[index].name, self.allocation.weights[index]
        weight = self._quantized(index)
        if f"{name} in int8" in self.known:
            return self.known[f"{name} in int8"]
        each = torch.tensor(bits).expand(len(weight.integers))
        kinds = sorted(set(each.tolist()))
        if self.stored == "int8":
            factors = self._raised(index).view(-1, *[1] * (weight.integers.dim() - 1))
            made = self._constant(f"{name}.weight_int8", (weight.integers * factors).to(torch.int8))
        elif len(kinds) == 1:
            made = self._unpacked(index, weight.integers, kinds[0])
        else:
            rows = [(each == kind).nonzero().flatten() for kind in kinds]
            parts = [self._unpacked(index, weight.integers[row], kind) for row, kind in zip(rows, kinds, strict=True)]
            order = torch.cat(rows).argsort().numpy().astype(np.min_scalar_type(len(each) - 1))
            places = self._add("Cast", [self._constant(f"{name}.weight_order", order)], {"to": ir.DataType.INT32})
            made = self._add("Gather", [self._add("Concat", parts, {"axis": 0}), places])
        self.known[f"{name} in int8"] = made
        return made

    def _unpacked(self, index: int, rows: Tensor, bits: int) -> ir.Value:
        """Rows (R, ...) of a layer's integers at `bits`, as the file stores them and as int8."""
        name = self.network.prepared.layers[index].name
        if self.stored == "native" and bits in _NATIVE:
            small = rows.numpy().astype(_NATIVE[bits])
            given = self._constant(f"{name}.weight_{small.dtype}_{bits}", small)
            return self._add("Cast", [given], {"to": ir.DataType.INT8})
        if self.stored == "native" or bits == 8:
            return self._constant(f"{name}.weight_int8_{bits}", rows)
        given = self._constant(f"{name}.weight_packed_{bits}", packed(rows, bits))
        attributes = {"bits": bits, "factor": int(raised(torch.tensor(bits))), "shape": list(rows.shape)}
        return self._add(unpacking.NAME, [given], attributes, domain=unpacking.DOMAIN, outputs=2)

    def _constant(self, name: str, value: Tensor | np.ndarray | np.generic) -> ir.Value:
        if name not in self.known:
            array = np.array(value.detach().numpy() if isinstance(value, Tensor) else value, order="C")
            tensor = ir.tensor(array, name=name)
            made = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            if name in self.graph.initializers:
                raise ExportMistake(f"two tensors of the network are called {name} in the file: rename a module.")
            self.graph.register_initializer(made)
            self.known[name] = made
        return self.known[name]

    def _add(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        name: str | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Value:
        """What a new node gives, the first of so many outputs."""
        assert self.place is not None
        made = [ir.Value(name=f"v{self.count + place}") for place in range(outputs)]
        self.count += outputs
        node = ir.node(operator, inputs, attributes, domain=domain, outputs=made, name=name)
        self.graph.insert_before(self.place, node)
        return made[0]

    def _replace(self, made: ir.Value) -> None:
        """Takes `made` for what the node in place gives, under its name where that is the graph's output."""
        assert self.place is not None
        (old,) = self.place.outputs
        if old.is_graph_output():
            made.name, made.type, made.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        self.graph.remove(self.place, safe=True)


def _operator(module: nn.Module, call: Call) -> tuple[str, dict[str, Any]]:
    """The operator of a layer, and its attributes that are not the default."""
    if isinstance(module, nn.Conv2d):
        left, right, above, below = call.pads
        geometry = {"strides": module.stride, "dilations": module.dilation, "pads": (above, left, below, right)}
        attributes: dict[str, Any] = {} if module.groups == 1 else {"group": module.groups}
        attributes |= {name: list(each) for name, each in geometry.items() if set(each) != {int(name != "pads")}}
        return "Conv", attributes
    return ("Gemm", {"transB": 1}) if call.rank == 2 else ("MatMul", {})
