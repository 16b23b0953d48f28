"""A quantized network as a program of torch.export, which plain PyTorch loads and runs.

Layers and what travels between them are quantized as PyTorch's own quantization of exported
programs writes it: a product of floats that `dequantize` operators give, of bytes and of int8
weights with a scale an output channel. Backends that lower such programs put integer kernels in
their place; PyTorch itself multiplies the floats.

The file is a zip of tensors and of the program as JSON. It is written anew with its tensors
compressed, since a weight of few bits takes a byte there, and with nothing of the machine or the day.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from pydantic import ValidationError
from torch import Tensor, fx, nn

from tap_eval.export.between import between
from tap_eval.export.description import BetweenDescription, Description, LayerDescription, described_operand, made
from tap_eval.export.following import computed_otherwise
from tap_eval.export.graph import BYTES, DOMAIN, PRODUCT, Call, Graph, graph_of
from tap_eval.export.header import FORMAT, Header, header_of
from tap_eval.export.remaining import Remaining, remaining
from tap_eval.mistake import ExportMistake
from tap_eval.quantization.quantizer import Affine, Allocation, QuantizedNetwork

_OPS = torch.ops.quantized_decomposed
_ATEN = torch.ops.aten
_KEY = "tap"
"""of what the file tells of the network, among the files that torch.export lets users add"""
_SAID = "val"
"""what is kept of what the exporter notes of a node: its shape and type"""
_THEN = (1980, 1, 1, 0, 0, 0)
"""the first day that a zip knows"""


class _Told(Header):
    """With what the operators of the program have as numbers."""

    channel_bits: dict[str, list[int]]
    """of each output channel, of layers whose channels differ"""
    scales: dict[str, tuple[float, int]]
    """scale and zero point, of a layer's input by its name, and of a value between layers by its own"""


def write(
    path: Path,
    network: QuantizedNetwork,
    allocation: Allocation,
    images: Tensor,
    about: Mapping[str, Any],
    *,
    strict: bool = False,
) -> Remaining:
    """Writes a network that has the bits of `allocation` to `path`, once the file has given its answers.

    They are compared step by step on `images` (N, C, H, W), 64 of which are enough. `about` is what else the file is to
    say, as JSON. Gives what is in float32. Raises `ExportMistake` where answers differ, for a network that torch does
    not export, and if `strict` where anything is in float32.
    """
    left = remaining(network)
    if strict:
        left.refuse(path.name)
    program, names = exported(network, images)
    held = program.state_dict.keys()
    content = _packed(program, _told(network, allocation, about, held).model_dump_json())
    if place := computed_otherwise(lambda part: run(content, names, part), network, images):
        raise ExportMistake(
            f"torch {torch.__version__} computes something else from the file than the network does, first in {place}: "
            "export to another format."
        )
    path.write_bytes(content)
    return left


def exported(network: QuantizedNetwork, example: Tensor) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The program of a network that has its bits, for any number of images like `example` (N, C, H, W).

    And what is called by `bytes_name` that its `quantize_per_tensor` give, in their order.
    """
    graph = graph_of(network, example[:1])
    module, names = _Building(graph, network).done()
    images = torch.zeros(2, *example.shape[1:])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # of torch's exporter, which has many
        raise ExportMistake(
            f"torch does not export the network ({' '.join(str(error).split())[:200]}): export another format."
        ) from error
    for node in program.graph.nodes:
        node.meta = {name: each for name, each in node.meta.items() if name == _SAID}
    program._example_inputs = None
    return program, names


class _Building:
    """A graph with PyTorch's operators in the place of nodes of our own."""

    def __init__(self, graph: Graph, network: QuantizedNetwork) -> None:
        self.graph = graph
        self.network = network
        self.root = nn.Module()
        self.weights: dict[int, fx.Node] = {}
        self.nodes = fx.Graph()
        self.nodes.output(self.nodes.graph_copy(graph.module.graph, {}))

    def done(self) -> tuple[fx.GraphModule, list[str]]:
        """The module, and what the bytes are called, in their order."""
        names = []
        for node in list(self.nodes.nodes):
            if node.op == "get_attr":
                constant = node.target
                node.target = self._put(self.graph.names[constant], getattr(self.graph.module, constant))
            elif node.target is torch.onnx.ops.symbolic:
                kind, (x,), attributes = node.args
                with self.nodes.inserting_before(node):
                    if kind == f"{DOMAIN}::{BYTES}":
                        value = self.graph.bytes[attributes["place"]]
                        names.append(value.name)
                        new = self._bytes(x, value.affine)
                    else:
                        assert kind == f"{DOMAIN}::{PRODUCT}"
                        new = self._product(x, self.graph.calls[attributes["call"]])
                node.replace_all_uses_with(new)
                self.nodes.erase_node(node)
        return fx.GraphModule(self.root, self.nodes), names

    def _bytes(self, x: fx.Node, affine: Affine) -> fx.Node:
        like = (affine.scale, affine.zero_point, 0, 2**affine.bits - 1, torch.uint8)
        whole = self.nodes.call_function(_OPS.quantize_per_tensor.default, (x, *like))
        return self.nodes.call_function(_OPS.dequantize_per_tensor.default, (whole, *like))

    def _product(self, x: fx.Node, call: Call) -> fx.Node:
        module, name = self.network.layers[call.layer].layer, self.network.prepared.layers[call.layer].name
        weight = self._weight(call.layer)
        bias = self.nodes.get_attr(f"{name}.corrected_bias")
        if not isinstance(module, nn.Conv2d):
            return self.nodes.call_function(_ATEN.linear.default, (x, weight, bias))
        left, right, above, below = call.pads
        padding = [above, left]
        if (left, above) != (right, below):
            x = self.nodes.call_function(_ATEN.constant_pad_nd.default, (x, list(call.pads), 0.0))
            padding = [0, 0]
        geometry = list(module.stride), padding, list(module.dilation), module.groups
        return self.nodes.call_function(_ATEN.conv2d.default, (x, weight, bias, *geometry))

    def _weight(self, index: int) -> fx.Node:
        """A layer's weight in float32, made of its integers once."""
        if index not in self.weights:
            weight, name = self.network.layers[index].weight, self.network.prepared.layers[index].name
            if weight is None:
                raise ValueError(f"{name} has no bits")
            zeros, largest = torch.zeros(len(weight.scale), dtype=torch.int64), int(weight.integers.abs().max())
            top = 2 ** max(largest.bit_length(), 1) - 1
            parts = {"weight_int8": weight.integers, "weight_scale": weight.scale, "weight_zero_point": zeros}
            nodes = [self.nodes.get_attr(self._put(f"{name}.{part}", value)) for part, value in parts.items()]
            self._put(f"{name}.corrected_bias", weight.bias)
            args = (*nodes, 0, -top, top, torch.int8)
            self.weights[index] = self.nodes.call_function(_OPS.dequantize_per_channel.default, args)
        return self.weights[index]

    def _put(self, name: str, tensor: Tensor) -> str:
        """Gives the program a tensor by the name that it has in the network."""
        holder, (*path, last) = self.root, name.split(".")
        try:
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_buffer(last, tensor.detach().clone(memory_format=torch.contiguous_format))
        except (KeyError, AttributeError) as error:
            raise ExportMistake(
                f"torch has no place for {name} in a program ({error}): rename a module, or export another format."
            ) from error
        return name


def run(content: bytes, names: list[str], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What a file computes of images (N, C, H, W): logits (N, classes), and bytes by `names`, those of its order."""
    module = torch.export.load(io.BytesIO(content)).module()
    shown = _Shown(module)
    logits = shown.run(images)
    return logits, dict(zip(names, shown.bytes, strict=True))


class _Shown(fx.Interpreter):
    """Runs a program and keeps its bytes."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.bytes: list[Tensor] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A step."""
        result = super().call_function(target, args, kwargs)
        if target is _OPS.quantize_per_tensor.default:
            self.bytes.append(result)
        return result


def _told(network: QuantizedNetwork, allocation: Allocation, about: Mapping[str, Any], held: Container[str]) -> _Told:
    """Of a network and the names of the tensors that the program has: layers that no image reaches have none."""
    values = between(network)
    header = header_of(network, allocation, values, about)
    named = list(zip((layer.name for layer in network.prepared.layers), network.layers, strict=True))
    affines = {name: layer.affine for name, layer in named if layer.affine is not None}
    affines |= {value.name: value.affine for value in values or ()}
    affines |= dict(zip(network.prepared.operands, network.operands, strict=True))
    pairs = zip(named, allocation.weights, strict=True)
    return _Told(
        **dict(header) | {"layers": [layer for layer in header.layers if f"{layer.name}.weight_int8" in held]},
        channel_bits={
            name: list(bits) for (name, _), bits in pairs if not isinstance(bits, int) and len(set(bits)) > 1
        },
        scales={name: (affine.scale, affine.zero_point) for name, affine in affines.items()},
    )


def _packed(program: torch.export.ExportedProgram, told: str) -> bytes:
    """The file, compressed."""
    plain, content = io.BytesIO(), io.BytesIO()
    torch.export.save(program, plain, extra_files={_KEY: told})
    with zipfile.ZipFile(plain) as given, zipfile.ZipFile(content, "w") as made_of:
        for name in given.namelist():
            entry = zipfile.ZipInfo(name, _THEN)
            entry.compress_type = zipfile.ZIP_DEFLATED
            made_of.writestr(entry, given.read(name), compresslevel=9)
    return content.getvalue()


def described(path: Path) -> Description:
    """What is in a file that `write` wrote; raises `ExportMistake` of any other."""
    try:
        with zipfile.ZipFile(path) as file:
            names = {name.partition("/")[2]: name for name in file.namelist()}
            if f"extra/{_KEY}" not in names:
                raise ExportMistake(
                    f"{path} does not hold a network that TAP quantized: give what `tap-agent apply --out FILE.pt2` "
                    "wrote."
                )
            text = file.read(names[f"extra/{_KEY}"])
            if (form := json.loads(text)["format"]) != FORMAT:
                raise ExportMistake(
                    f"{path} is of format {form}, and this version of TAP reads {FORMAT}: write it anew."
                )
            told = _Told.model_validate_json(text)
            weights = json.loads(file.read(names["data/weights/model_weights_config.json"]))["config"]
            entries = {name: names[f"data/weights/{each['path_name']}"] for name, each in weights.items()}
            sizes = {name: file.getinfo(entry).compress_size for name, entry in entries.items()}
            scales = {
                layer.name: np.frombuffer(file.read(entries[f"{layer.name}.weight_scale"]), np.float32)
                for layer in told.layers
            }
    except OSError as error:
        raise ExportMistake(f"{path} cannot be read ({error.strerror or error}): give a file that is there.") from error
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, ValidationError) as error:
        raise ExportMistake(
            f"{path} is no program of torch.export that TAP wrote, or damaged ({' '.join(str(error).split())[:100]}): "
            "write it anew."
        ) from error
    parts = ("weight_int8", "weight_scale", "weight_zero_point", "corrected_bias")
    layers = tuple(
        LayerDescription(
            name=layer.name,
            kind=layer.kind,
            shape=layer.shape,
            bits=dict(sorted(Counter(told.channel_bits.get(layer.name, [*layer.bits] * layer.shape[0])).items())),
            stored="int8, compressed",
            size=sum(sizes[f"{layer.name}.{part}"] for part in parts),
            scales=(float(scales[layer.name].min()), float(scales[layer.name].max())),
            activation_bits=layer.activation_bits,
            inputs=Affine(*told.scales[layer.name], layer.activation_bits).range,
        )
        for layer in told.layers
    )
    of_layers = {f"{layer.name}.{part}" for layer in told.layers for part in parts}
    found = Description(
        form="a program of torch.export",
        layers=layers,
        in_float={name: size for name, size in sizes.items() if name not in of_layers},
        about={name: each if isinstance(each, str) else json.dumps(each) for name, each in told.about.items()},
        between=tuple(
            BetweenDescription(
                value.name, made(value.operation, value.of, value.then), 0, Affine(*told.scales[value.name], 8).range
            )
            for value in told.between or ()
        )
        + tuple(replace(described_operand(name, Affine(*told.scales[name], 8)), size=0) for name in told.operands),
    )
    return replace(found, overhead=path.stat().st_size - (found.size or 0))
