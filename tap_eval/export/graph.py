"""A quantized network as a graph for any number of images, with nodes of our own for its layers.

The network is recorded with two and with three images: an integer that differs is so many times
the number of images. What was recorded is what is exported, so that folded normalization and
whatever else the prepared network does is right by construction. Zeros are padded by the
convolution that reads them, and ReLU and ReLU6 are left to bytes that end there.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tap_eval.mistake import ExportMistake
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.preparing.program import Program, Step, Value, readers_of, record
from tap_eval.quantization.quantizer import Affine, QuantizedNetwork
from tap_eval.quantization.rewriting import activation_of, ends_in
from tap_eval.quantization.sums import moves, pads_with_zeros, read_by

INPUT, OUTPUT = "pixels", "logits"
_FEW, _MORE = 2, 3
"""images with which a network is recorded"""
_ATEN = torch.ops.aten
_PASSING = {
    _ATEN.relu.default, _ATEN.hardtanh.default, _ATEN.clamp.default, _ATEN.max_pool2d_with_indices.default,
    _ATEN.reshape.default, _ATEN.permute.default, _ATEN.transpose.int, _ATEN.expand.default, _ATEN.clone.default,
    _ATEN.unsqueeze.default, _ATEN.squeeze.default, _ATEN.squeeze.dim, _ATEN.squeeze.dims,
    _ATEN.slice.Tensor, _ATEN.select.int, operator.getitem,
}  # fmt: skip
"""steps that move numbers, cut them off or take the largest: whether bytes are made before or after, to runtimes a
convolution ends in bytes"""
DOMAIN, PRODUCT, BYTES = "tap", "Product", "Bytes"
"""of our own nodes: a call of a layer, and a value that becomes bytes and numbers again"""


@dataclass(frozen=True)
class Call:
    """A call of a layer."""

    layer: int
    """the layer's index"""
    label: str
    """the layer's name, with a number where it is called again"""
    pads: tuple[int, ...]
    """zeros that a convolution adds to its input: left, right, above and below"""
    rank: int
    """axes of the input"""
    then: Affine | None
    """the integers that the output becomes, where nothing else is made of it"""


@dataclass(frozen=True)
class Bytes:
    """A value that becomes bytes."""

    name: str
    """see `bytes_name`"""
    affine: Affine
    reader: str | None
    """the label of the first call of a layer that reads it"""


@dataclass(frozen=True)
class Graph:
    """From images to logits; a `PRODUCT` has the number of its `call`, and `BYTES` a `place` in `bytes`."""

    module: fx.GraphModule
    names: Mapping[str, str]
    """of constants: what they are called in the network"""
    calls: Mapping[int, Call]
    """by their number in a pass"""
    bytes: Sequence[Bytes]


def graph_of(network: QuantizedNetwork, image: Tensor) -> Graph:
    """The graph of a network that has its bits, for images like `image` (1, C, H, W).

    Raises `ExportMistake` for a network whose steps cannot be recorded, or are others for another
    number of images.
    """
    prepared = network.prepared
    few, more = (recorded(prepared, image.expand(count, -1, -1, -1)) for count in (_FEW, _MORE))
    if [step.function for step in few.steps] != [step.function for step in more.steps]:
        raise _depends_on_count("takes other steps")
    if len(few.constants) != len(more.constants):
        raise _depends_on_count("has other constants")
    others = {step.value: other.value for step, other in zip(few.steps, more.steps, strict=True)}
    labels = labels_of(few, prepared)
    building = _Building(few, {few.pixels: more.pixels, **others}, network, labels, network.rounded_in(few))
    for (value, tensor), again in zip(few.constants.items(), more.constants.values(), strict=True):
        if value in building.readers or value is few.logits:
            building.known[value] = building.constant(tensor, again)
    for step, other in zip(few.steps, more.steps, strict=True):
        building.add(step, other)
    return building.done()


def names_of(program: Program) -> dict[Value, str]:
    """What values are called, the same for any number of images."""
    return {program.pixels: INPUT, **{step.value: f"step_{place}" for place, step in enumerate(program.steps)}}


def bytes_name(name: str, affine: Affine) -> str:
    """What the bytes of a value are called in a file."""
    return f"{name}:{affine.bits}"


def labels_of(program: Program, prepared: Prepared) -> dict[int, str]:
    """What calls of layers are called in a file, by their number in a pass."""
    labels: dict[int, str] = {}
    before = Counter[int]()
    for step in program.steps:
        if step.layer is not None and step.call is not None:
            name = prepared.layers[step.layer].name
            labels[step.call] = f"{name}:{before[step.layer]}" if before[step.layer] else name
            before[step.layer] += 1
    return labels


def unpadded(step: Step, makers: Mapping[Value, Step], module: Quantizable) -> tuple[Value, tuple[int, ...]]:
    """What a layer's call reads, without zeros that a convolution can pad by itself: left, right, above, below."""
    value, maker = step.args[0], makers.get(step.args[0])
    if maker is not None and isinstance(module, nn.Conv2d) and pads_with_zeros(maker):
        pads = tuple(int(each) for each in (*maker.args[1], 0, 0))
        if min(pads) >= 0 and not any(pads[4:]):
            return maker.args[0], pads[:4]
    return value, (0, 0, 0, 0)


def recorded(prepared: Prepared, images: Tensor) -> Program:
    """The steps of a network for as many images; raises `ExportMistake` where they cannot be recorded."""
    try:
        return record(prepared, images.contiguous())
    except Exception as error:  # the network's code under a tracer: whatever it raises, it cannot be recorded
        raise ExportMistake(
            f"the network's steps cannot be recorded ({type(error).__name__}: {' '.join(str(error).split())[:200]}): "
            "give one whose way through its code does not depend on the images."
        ) from error


def _depends_on_count(what: str) -> ExportMistake:
    return ExportMistake(
        f"the network {what} for three images than for two, and a file has one graph for any number: give a network "
        "whose code does not ask how many images there are."
    )


@dataclass
class _Building:
    """The graph as far as it is built."""

    few: Program
    others: Mapping[Value, Value]
    """the value that each is in the program of more images"""
    network: QuantizedNetwork
    labels: Mapping[int, str]
    values: Mapping[Value, Affine]
    """that become bytes besides those that layers read"""
    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Tensor] = field(default_factory=dict)
    known: dict[Value, fx.Node] = field(default_factory=dict)
    """the node of each value"""
    instead: dict[Value, fx.Node] = field(default_factory=dict)
    """the bytes of values that all read as such"""
    held: dict[Value, Affine] = field(default_factory=dict)
    """values whose numbers are bytes"""
    layers: dict[int, tuple[Call, fx.Node]] = field(default_factory=dict)
    """by the number of the call"""
    bytes: list[Bytes] = field(default_factory=list)
    places: dict[tuple[Value, Affine], fx.Node] = field(default_factory=dict)
    """bytes of values"""

    def __post_init__(self) -> None:
        self.known[self.few.pixels] = self.graph.placeholder(INPUT)
        self.batch = self.graph.call_function(_ATEN.sym_size.int, (self.known[self.few.pixels], 0))
        self.readers = readers_of(self.few.steps)
        self.makers = {step.value: step for step in self.few.steps}
        self.names = names_of(self.few)

    def add(self, step: Step, other: Step) -> None:
        """A step, as it is with few and with more images."""
        if step.layer is not None:
            self._add_layer(step)
        elif step.operand is not None:
            self.known[step.value] = self.read(step.args[0])
            self.known[step.value] = self.bytes_of(step.value, self.network.operands[step.operand])
        else:
            args, kwargs = self.joined(step.args, other.args), self.joined(dict(step.kwargs), dict(other.kwargs))
            self.known[step.value] = self.graph.call_function(step.function, args, kwargs)
        affine = self.values.get(step.value) or (self.held.get(read_by(step)) if moves(step) else None)
        if affine:
            self.held[step.value] = affine
            if step.value in self.values or pads_with_zeros(step):  # runtimes see that other moves give bytes of bytes
                self.instead[step.value] = self.bytes_of(step.value, affine)

    def _add_layer(self, step: Step) -> None:
        assert step.layer is not None
        assert step.call is not None
        layer, label = self.network.layers[step.layer], self.labels[step.call]
        value, pads = unpadded(step, self.makers, layer.layer)
        x = self.read(value) if layer.affine is None else self.bytes_of(value, layer.affine, label)
        node = self.known[step.value] = self._own(PRODUCT, x, step.value, call=step.call)
        rows, columns = getattr(layer.layer, "padding", (0, 0))
        whole = tuple(int(each) for each in map(operator.add, pads, (columns, columns, rows, rows)))
        self.layers[step.call] = Call(step.layer, label, whole, value.meta["val"].dim(), None), node

    def read(self, value: Value) -> fx.Node:
        """The node of a value, as steps read it."""
        return self.instead.get(value) or self.known[value]

    def bytes_of(self, value: Value, affine: Affine, reader: str | None = None) -> fx.Node:
        """The node of a value's bytes; `reader` is the call of a layer that reads them."""
        if (value, affine) not in self.places:
            self.places[value, affine] = self._own(BYTES, self.read(value), value, place=len(self.bytes))
            self.bytes.append(Bytes(bytes_name(self.names[value], affine), affine, reader))
        return self.places[value, affine]

    def _own(self, kind: str, x: fx.Node, like: Value, **attributes: int) -> fx.Node:
        """A node of our own, whose value has the shape of another."""
        shape = self.joined(*(list(each.meta["val"].shape) for each in (like, self.others[like])))
        given = (f"{DOMAIN}::{kind}", (x,), attributes)
        return self.graph.call_function(torch.onnx.ops.symbolic, given, {"dtype": torch.float32, "shape": shape})

    def joined(self, few: Any, more: Any) -> Any:
        """An argument for any number of images."""
        if isinstance(few, Value):
            return self.read(few)
        if isinstance(few, list | tuple) and isinstance(more, list | tuple) and len(few) == len(more):
            return type(few)(self.joined(*pair) for pair in zip(few, more, strict=True))
        if isinstance(few, dict):
            return {name: self.joined(value, more[name]) for name, value in few.items()}
        if few == more or few is more:
            return few
        if isinstance(few, int) and isinstance(more, int) and few * _MORE == more * _FEW:
            return self.times(few // _FEW)
        raise _depends_on_count(f"computes with {more} in place of {few}")

    def times(self, count: int) -> fx.Node:
        """So many times the number of images."""
        return self.batch if count == 1 else self.graph.call_function(operator.mul, (self.batch, count))

    def constant(self, few: Tensor, more: Tensor) -> fx.Node:
        """What does not depend on the pixels; it may be there for each image, but has to be the same for each."""
        if few.shape == more.shape and torch.equal(few, more):
            return self._held(few)
        axes = [axis for axis in range(few.dim()) if few.shape[axis] != more.shape[axis]] if few.dim() else []
        if len(axes) == 1 and few.shape[axes[0]] * _MORE == more.shape[axes[0]] * _FEW:
            (axis,) = axes
            one = few.narrow(axis, 0, few.shape[axis] // _FEW)
            if torch.equal(torch.cat([one] * _FEW, axis), few) and torch.equal(torch.cat([one] * _MORE, axis), more):
                repeats = [self.batch if each == axis else 1 for each in range(few.dim())]
                return self.graph.call_function(_ATEN.repeat.default, (self._held(one), repeats))
        raise _depends_on_count("has other constants")

    def _held(self, tensor: Tensor) -> fx.Node:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor
        return self.graph.get_attr(name)

    def done(self) -> Graph:
        """The graph, with activations left to bytes that end there."""
        self.graph.output(self.read(self.few.logits))
        self.graph.eliminate_dead_code()
        for value, step in reversed(self.makers.items()):
            found = activation_of(step)
            affine = self._then(self.known[value])
            if found and affine and ends_in(affine, *found):
                self.known[value].replace_all_uses_with(self.known[step.args[0]])
        self.graph.eliminate_dead_code()
        root = nn.Module()
        for name, tensor in self.constants.items():
            root.register_buffer(name, tensor)
        module = fx.GraphModule(root, self.graph)
        calls = {number: replace(call, then=self._then(node)) for number, (call, node) in self.layers.items()}
        return Graph(module, self._names(), calls, self.bytes)

    def _names(self) -> dict[str, str]:
        """Of constants that are tensors of the network as they are, their names; the others keep theirs."""
        prepared = self.network.prepared
        every = (prepared.network.named_parameters, prepared.network.named_buffers)
        held = prepared.in_float() | {name: each for named in every for name, each in named()}
        found = {constant: constant for constant in self.constants}
        for constant, tensor in self.constants.items():
            same = (name for name, each in held.items() if each.shape == tensor.shape and torch.equal(each, tensor))
            if name := next(same, None):
                found[constant] = name
                del held[name]
        return found

    def _then(self, node: fx.Node) -> Affine | None:
        """The integers that all become that is made of a node."""
        bytes_of = {node: affine for (_, affine), node in self.places.items()}
        read_as = {bytes_of.get(user) for user in node.users}
        if len(read_as) == 1 and None not in read_as:
            return read_as.pop()
        if len(node.users) == 1 and (user := next(iter(node.users))).target in _PASSING:
            return self._then(user)
        return None
