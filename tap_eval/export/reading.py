"""What is in an ONNX file of a quantized network, read without running it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch

from tap_eval.export import unpacking
from tap_eval.export.description import BetweenDescription, Description, LayerDescription
from tap_eval.mistake import ExportMistake
from tap_eval.quantization.quantizer import raised

KEYS = "weight_bits", "activation_bits"
"""in the file's metadata, as JSON by the names of layers"""
MADE = "graph:"
"""how constants are called that the exporter has made: shapes, slopes, limits"""
_OWN = re.compile(r"(?P<layer>.+)\.(weight_\w+|corrected_bias\w*|input_scale)")
_BETWEEN = re.compile(r"step_\d+:8\.scale")
"""of a value that becomes bytes by no layer that reads it"""
_STORED = {"packed": "uint8, packed"}
_WEIGHT = re.compile(r".+\.weight_(?P<kind>packed|int[248])(_(?P<bits>\d))?")


def described(path: Path) -> Description:
    """What is in a file that `write` wrote; raises `ExportMistake` of any other."""
    try:
        model = onnx.load(path)
    except OSError as error:
        raise ExportMistake(f"{path} cannot be read ({error.strerror or error}): give a file that is there.") from error
    except Exception as error:  # protobuf's own, which has no public name
        raise ExportMistake(f"{path} is no ONNX, or cut off: write it anew.") from error
    about = {each.key: each.value for each in model.metadata_props}
    if not about.keys() >= set(KEYS):
        raise ExportMistake(
            f"{path} does not hold a network that TAP quantized: give what `tap-agent apply --out FILE.onnx` wrote."
        )
    try:
        weight_bits, activation_bits = (json.loads(about.pop(key)) for key in KEYS)
        file = _File(model)
        layers = tuple(
            file.layer(node, weight_bits[node.name], activation_bits[node.name])
            for node in model.graph.node
            if node.name in weight_bits
        )
        found = Description("ONNX", layers, file.in_float(), about, between=file.between(model))
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise ExportMistake(
            f"{path} was changed by other software since TAP wrote it, or is damaged "
            f"({type(error).__name__}: {' '.join(str(error).split())[:100]}): write it anew."
        ) from error
    return replace(found, overhead=path.stat().st_size - (found.size or 0))


class _File:
    """The constants of a graph by name, and the nodes by what they give."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = {each.name: each for each in model.graph.initializer}
        self.makers = {output: node for node in model.graph.node for output in node.output}
        self.readers = {value: node for node in model.graph.node for value in node.input}

    def layer(self, node: onnx.NodeProto, bits: int | list[int], activation_bits: int) -> LayerDescription:
        """The layer whose first call is `node`."""
        own = [name for name in self.constants if (at := _OWN.fullmatch(name)) and at["layer"] == node.name]
        weights = [at for name in own if (at := _WEIGHT.fullmatch(name))]
        shapes = [self._shape(at[0]) for at in weights]
        shape = (sum(each[0] for each in shapes), *shapes[0][1:])
        groups = next((each.i for each in node.attribute if each.name == "group"), 1)
        each = np.broadcast_to(bits, shape[0]).tolist()
        scale = self._array(f"{node.name}.weight_scale")
        if not any(at["kind"] != "packed" and at["bits"] and int(at["bits"]) < 8 for at in weights):
            scale = scale * raised(torch.tensor(each)).numpy()
        _, input_scale, zero_point = self.makers[node.input[0]].input
        step, zero = float(self._array(input_scale)), int(self._array(zero_point))
        return LayerDescription(
            name=node.name,
            kind="linear" if node.op_type != "Conv" else "depthwise" if groups > 1 and shape[1] == 1 else "conv",
            shape=shape,
            bits=dict(sorted(Counter(each).items())),
            stored=" and ".join(dict.fromkeys(_STORED.get(at["kind"], at["kind"]) for at in weights)),
            size=sum(self._size(name) for name in own) + 1,
            scales=(float(scale.min()), float(scale.max())),
            activation_bits=activation_bits,
            inputs=(-zero * step, (2**activation_bits - 1 - zero) * step),
        )

    def between(self, model: onnx.ModelProto) -> tuple[BetweenDescription, ...]:
        """What becomes bytes between layers, each by the layer before it."""
        found, before = [], ""
        for node in model.graph.node:
            before = node.name or before
            if node.op_type == "QuantizeLinear" and _BETWEEN.fullmatch(node.input[1]):
                step, zero = float(self._array(node.input[1])), int(self._array(node.input[2]))
                made = self.makers[node.input[0]].op_type
                reach = -zero * step, (255 - zero) * step
                found.append(BetweenDescription(f"{before}:{made}", made, self._size(node.input[1]) + 1, reach))
        return tuple(found)

    def in_float(self) -> dict[str, int]:
        """Bytes of what no layer holds, by name."""
        floats = [each.name for each in self.constants.values() if each.data_type == onnx.TensorProto.FLOAT]
        others = [name for name in floats if not (_OWN.fullmatch(name) or _BETWEEN.fullmatch(name))]
        return {name: self._size(name) for name in others if not name.startswith(MADE)}

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, unpacked."""
        reader = self.readers[name]
        if reader.op_type == unpacking.NAME:
            return next(tuple(each.ints) for each in reader.attribute if each.name == "shape")
        return tuple(self.constants[name].dims)

    def _array(self, name: str) -> np.ndarray:
        return onnx.numpy_helper.to_array(self.constants[name])

    def _size(self, name: str) -> int:
        """In bytes, as it lies in the file."""
        return len(self.constants[name].raw_data)
