"""A network as a straight list of steps, so that it can be run in part, again from the middle, or in integers.

The steps are ATen operators, recorded while the network runs once; each quantizable layer is
one step. Any network can be recorded whose way through its code does not depend on the
pixels; the size of a batch is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tap_eval.device import CPU
from tap_eval.mistake import ImagesMistake
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Change, Quantizable, same

Value = fx.Node
"""Stands for what a step computes."""
Environment = dict[Value, Any]
"""What has been computed so far and is still needed."""

_ATEN = torch.ops.aten
_RECORDED: ContextVar[Sequence[Quantizable]] = ContextVar("layers being recorded")
_LIBRARY = torch.library.Library("tap", "DEF")
_LIBRARY.define("layer(Tensor x, int index, int call) -> Tensor")
_LIBRARY.impl("layer", lambda x, index, call: _RECORDED.get()[index](x), "CompositeExplicitAutograd")
_LIBRARY.define("operand(Tensor x, int number) -> Tensor")
_LIBRARY.impl("operand", lambda x, number: x.clone(), "CompositeExplicitAutograd")
_ANY_LAYOUT = {_ATEN.view.default: _ATEN.reshape.default, _ATEN._unsafe_view.default: _ATEN.reshape.default}


@dataclass(frozen=True)
class Step:
    """`value = function(*args, **kwargs)`, with values in the arguments; afterwards `frees` are not needed."""

    value: Value
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    frees: tuple[Value, ...] = ()
    layer: int | None = None
    """index of the layer, for a layer's call; its one argument is the input"""
    call: int | None = None
    """which of all calls of layers in a pass it is, for a layer's call"""
    operand: int | None = None
    """number of the operand that it gives, which is its one argument itself before `bind_operands`"""

    def run(self, known: Environment) -> None:
        """Computes the value, and drops what is not needed any more."""
        if self._nested:
            args, kwargs = fx.node.map_arg((self.args, self.kwargs), known.__getitem__)
        else:
            args, kwargs = tuple([known[arg] if isinstance(arg, Value) else arg for arg in self.args]), self.kwargs
        self.put(self.function(*args, **kwargs), known)

    def put(self, result: Any, known: Environment) -> None:
        """The same, with the value given."""
        known[self.value] = result
        for value in self.frees:
            del known[value]

    @cached_property
    def _nested(self) -> bool:
        """Whether there are values within an argument, or by keyword."""
        return set(self.needs) != {arg for arg in self.args if isinstance(arg, Value)}

    @property
    def needs(self) -> list[Value]:
        """The values among the arguments."""
        found: list[Value] = []
        fx.node.map_arg((self.args, self.kwargs), found.append)
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Program:
    """The steps of a network from a batch of `batch` images to their logits."""

    steps: tuple[Step, ...]
    pixels: Value
    logits: Value
    constants: Mapping[Value, Tensor]
    batch: int
    device: torch.device = CPU
    """on which it was recorded, and runs"""

    def begin(self, pixels: Tensor) -> Environment:
        """What is known before the first step, of images on any device."""
        return {**self.constants, self.pixels: pixels.to(self.device)}

    def padded(self, pixels: Tensor) -> Tensor:
        """At most `batch` images filled up to as many, by repeating the last.

        Raises `ImagesMistake` for images of another size than that at which steps were recorded, which may hold it.
        """
        recorded = self.pixels.meta["val"].shape[1:]
        if pixels.shape[1:] != recorded:
            raise ImagesMistake(
                f"images are {tuple(pixels.shape[1:])}, and the network's steps were recorded for {tuple(recorded)}: "
                "give images of that size, or quantize for this one."
            )
        missing = self.batch - len(pixels)
        return torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])]) if missing else pixels

    def input_shapes(self) -> dict[int, torch.Size]:
        """The shape of each layer's input, by the layer's index."""
        return {step.layer: step.args[0].meta["val"].shape for step in self.steps if step.layer is not None}

    def run(self, known: Environment, start: int = 0) -> Tensor:
        """The logits (batch, classes), from the step at `start`; `known` is used up."""
        for step in self.steps[start:]:
            step.run(known)
        return known[self.logits]


@torch.inference_mode(False)  # in which PyTorch takes interpolation apart into other steps
@torch.no_grad()
def record(prepared: Prepared, example: Tensor) -> Program:
    """The program of a network for batches of the size of `example`; raises what tracing raises."""
    example = example.clone()  # which may be of inference mode
    calls = count()

    def marked(index: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.ops.tap.layer(x, index, next(calls))

    layers = [marked(index) for index in range(len(prepared.layers))]
    operand = _marked_operand if prepared.operands else None
    token = _RECORDED.set(prepared.modules)
    try:
        traced = make_fx(lambda x: prepared(x, layers, operand))(example)  # functorch refuses autograd.Function
        traced = make_fx(torch.func.functionalize(_folded(traced)))(example)
    finally:
        _RECORDED.reset(token)
    nodes = list(traced.graph.nodes)
    if writing := next(filter(_writes, nodes), None):
        raise RuntimeError(f"{writing.target} writes to its argument")
    (pixels,) = (node for node in nodes if node.op == "placeholder")
    (output,) = (node for node in nodes if node.op == "output")
    constants = {node: getattr(traced, node.target) for node in nodes if node.op == "get_attr"}
    steps = [_step(node) for node in nodes if node.op == "call_function"]
    return Program(free(steps, output.args[0]), pixels, output.args[0], constants, len(example), example.device)


def _marked_operand(number: int, x: Tensor) -> Tensor:
    found: Tensor = torch.ops.tap.operand(x, number)
    return found


def _folded(traced: fx.GraphModule) -> fx.GraphModule:
    """With what is computed of constants alone as constants, so that code that writes to them has written."""
    graph, values = traced.graph, dict[Value, Any]()
    for node in list(graph.nodes):
        if node.op == "get_attr":
            values[node] = getattr(traced, node.target).clone()
        elif node.op == "call_function" and node.all_input_nodes and values.keys() >= set(node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for place, (node, value) in enumerate(values.items()):
        readers = [user for user in node.users if user not in values]
        if readers and isinstance(value, Tensor):
            name = f"_folded_{place}"
            traced.register_buffer(name, value)
            with graph.inserting_before(node):
                constant = graph.get_attr(name)
            for reader in readers:
                reader.replace_input_with(node, constant)
    for node in reversed(values):
        if not node.users:
            graph.erase_node(node)
    traced.recompile()
    return traced


def _writes(node: Value) -> bool:
    """Whether it changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _step(node: Value) -> Step:
    target: Any = node.target
    if target is torch.ops.tap.layer.default:
        x, index, call = node.args
        assert isinstance(index, int)
        assert isinstance(call, int)
        return Step(node, _no_layer, (x,), {}, layer=index, call=call)
    if target is torch.ops.tap.operand.default:
        x, number = node.args
        assert isinstance(number, int)
        return Step(node, same, (x,), {}, operand=number)
    return Step(node, _ANY_LAYOUT.get(target, target), node.args, node.kwargs)


def _no_layer(x: Tensor) -> Tensor:
    raise RuntimeError("a layer's step runs only after `bind`")


def free(steps: Sequence[Step], logits: Value) -> tuple[Step, ...]:
    """The steps, each with the values that no later one needs; steps whose value nobody needs are left out."""
    needed, freed = {logits}, []
    for step in reversed(steps):
        if step.value in needed:
            last = tuple(value for value in step.needs if value not in needed)
            needed |= set(last)
            freed.append(replace(step, frees=last))
    return tuple(reversed(freed))


def readers_of(steps: Sequence[Step]) -> dict[Value, list[Step]]:
    """Which steps read each value."""
    readers: dict[Value, list[Step]] = {}
    for step in steps:
        for value in step.needs:
            readers.setdefault(value, []).append(step)
    return readers


def bind(program: Program, layers: Sequence[Callable[[Tensor], Tensor]]) -> Program:
    """The program with something that computes each layer."""
    steps = [step if step.layer is None else replace(step, function=layers[step.layer]) for step in program.steps]
    return replace(program, steps=tuple(steps))


def bind_operands(program: Program, operands: Sequence[Change]) -> Program:
    """The program with what is multiplied in the place of each operand of a product of two activations."""
    steps = [step if step.operand is None else replace(step, function=operands[step.operand]) for step in program.steps]
    return replace(program, steps=tuple(steps))
