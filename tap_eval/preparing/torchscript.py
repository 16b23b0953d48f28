"""TorchScript networks read step by step, so that a `TorchFunctionMode` sees each call inside them.

A scripted, traced or frozen network runs in TorchScript's own interpreter, out of sight of Python. Here its graph
becomes plain steps, run in Python: convolutions, products and norms are called as the modules of `torch.nn` call
them, with the network's own parameters; other operations on tensors are called as `torch.ops.aten.NAME.OVERLOAD`.
"""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tap_eval.preparing.operators import operator_of, unreadable


def readable(network: nn.Module) -> nn.Module:
    """`network` with a `Readable` in the place of each `torch.jit.ScriptModule`; a network without one as it is.

    Nothing is shared with the scripted modules; an eager network that holds some is copied. Parameters and buffers
    keep their names and are shared among each other as before. Raises `NetworkMistake` for what cannot be read.
    """
    if isinstance(network, torch.jit.ScriptModule):
        return Readable(network)
    scripted = {id(module): module for module in _outermost(network)}
    read: dict[int, Any] = {address: Readable(module) for address, module in scripted.items()}
    return copy.deepcopy(network, read) if read else network


def _outermost(network: nn.Module) -> Iterator[torch.jit.ScriptModule]:
    for child in network.children():
        if isinstance(child, torch.jit.ScriptModule):
            yield child
        else:
            yield from _outermost(child)


@dataclass(frozen=True)
class _Step:
    operator: str
    """with its overload, as "aten::add.Tensor" """
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    value: Any = None
    """of a constant, the path of an attribute, or the name and the fields of a named tuple"""
    blocks: tuple[_Block, ...] = ()
    last_uses: tuple[str, ...] = ()
    """values that nothing reads after this step, so that they need not be kept"""

    def reads(self) -> Iterator[str]:
        yield from self.inputs
        for block in self.blocks:
            yield from block.outputs
            for step in block.steps:
                yield from step.reads()


@dataclass(frozen=True)
class _Block:
    inputs: tuple[str, ...]
    steps: tuple[_Step, ...]
    outputs: tuple[str, ...]


class _Part(nn.Module):
    """Stands for a submodule, whose parameters and buffers it holds; printed under the name of its class."""

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self._script_name = str(script.original_name)

    def _get_name(self) -> str:
        return self._script_name


class Readable(_Part):
    """What a `torch.jit.ScriptModule` computes, step by step in Python.

    It has copies of the submodules, parameters and buffers of `script`. Other tensors of the graph, as those that
    freezing made constants, are called `constant_0`, `constant_1`, ... in its order: parameters without gradient
    where they are floating and have a dimension, else buffers.
    """

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        whole = torch.jit._recursive.wrap_cpp_module(script._c)  # freezing leaves out the submodules that it keeps
        super().__init__(whole)
        _copy_state(whole, self, {})
        if script._forward_pre_hooks or script._forward_hooks:
            raise unreadable("a scripted hook")
        if not script._c._has_method("forward"):
            raise unreadable(f"{self._script_name} without forward")
        arguments = script._c._get_method("forward").schema.arguments[1:]
        self._script_names = [argument.name for argument in arguments]
        self._script_defaults = {each.name: each.default_value for each in arguments if each.has_default_value()}
        self._script_steps = _Reader(whole, self).read()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and gives what the scripted `forward` does. Raises `NetworkMistake` for an operator that is unknown."""
        names = self._script_names
        values = self._script_defaults | dict(zip(names, args, strict=False)) | kwargs
        if len(args) > len(names) or values.keys() != set(names):
            raise TypeError(f"{self._script_name} takes {', '.join(names)}, but was given others, or too few.")
        (result,) = _run(self, self._script_steps, {}, [values[name] for name in names])
        return result


def _run(network: nn.Module, block: _Block, outer: dict[str, Any], inputs: Iterable[Any]) -> list[Any]:
    """The outputs of `block`, which sees the values `outer` and its own `inputs`."""
    values = outer | dict(zip(block.inputs, inputs, strict=True))
    for step in block.steps:
        values.update(zip(step.outputs, _results(network, step, values), strict=True))
        for name in step.last_uses:
            del values[name]
    return [values[name] for name in block.outputs]


def _results(network: nn.Module, step: _Step, values: dict[str, Any]) -> Sequence[Any]:
    inputs = [values[name] for name in step.inputs]
    match step.operator:
        case "prim::Constant":
            return [copy.copy(step.value)]
        case "prim::GetAttr":
            owner, _, name = step.value.rpartition(".")
            return [getattr(network.get_submodule(owner), name)]
        case "prim::SetAttr":
            owner, _, name = step.value.rpartition(".")
            setattr(network.get_submodule(owner), name, inputs[0])
            return []
        case "prim::If":
            return _run(network, step.blocks[0 if inputs[0] else 1], values, [])
        case "prim::Loop":
            trips, goes_on, *carried = inputs
            trip = 0
            while goes_on and trip < trips:
                goes_on, *carried = _run(network, step.blocks[0], values, [trip, *carried])
                trip += 1
            return carried
        case "prim::TupleConstruct" if step.value is not None:
            return [_named_tuple(*step.value)(*inputs)]
        case "prim::ListUnpack" | "prim::TupleUnpack":
            return list(inputs[0])
    result = operator_of(step.operator)(*inputs)
    return [result] if len(step.outputs) == 1 else list(result) if step.outputs else []


@functools.cache
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


def _copy_state(script: Any, module: nn.Module, copies: dict[int, Tensor]) -> None:
    """Gives `module` copies of what `script` holds; `copies` has those made, so that what was shared stays so."""
    module.training = getattr(script, "training", False)  # freezing takes it away, with all that depends on it
    for name, tensor in script.named_parameters(recurse=False, remove_duplicate=False):
        copied: Any = copies.setdefault(id(tensor), nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
        module.register_parameter(name, copied)
    for name, tensor in script.named_buffers(recurse=False, remove_duplicate=False):
        module.register_buffer(name, copies.setdefault(id(tensor), tensor.detach().clone()))
    for name, child in script.named_children():
        module.add_module(name, _Part(child))
        _copy_state(child, module.get_submodule(name), copies)


class _Reader:
    """Makes steps of the graph of `script`, and registers its tensors that are no parameters with `network`."""

    def __init__(self, script: torch.jit.ScriptModule, network: nn.Module) -> None:
        self._graph: Any = script.inlined_graph
        self._scripts: dict[str, Any] = {"": script} | dict(script.named_modules(remove_duplicate=False))
        self._network = network
        self._tensors = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        self._tensors |= {name for name, _ in network.named_buffers(remove_duplicate=False)}
        self._modules: dict[str, str] = {}
        """paths of the values that are modules"""
        self._constants: dict[int, tuple[str, Tensor]] = {}

    def read(self) -> _Block:
        this, *inputs = (value.debugName() for value in self._graph.inputs())
        self._modules[this] = ""
        return self._block(self._graph, inputs, always=True)

    def _block(self, block: Any, inputs: Sequence[str], always: bool) -> _Block:
        """`always` says that it runs whatever the input, so that an operator that is unknown is told at once."""
        outputs = tuple(value.debugName() for value in block.outputs())
        steps = [step for node in block.nodes() for step in self._steps(node, always)]
        own = set(inputs).union(*(step.outputs for step in steps))
        used, freeing = set(outputs), []
        for step in reversed(steps):
            names = {*step.outputs, *step.reads()}
            freeing.append(replace(step, last_uses=tuple(sorted((names & own) - used))))
            used |= names
        return _Block(tuple(inputs), tuple(reversed(freeing)), outputs)

    def _steps(self, node: Any, always: bool) -> list[_Step]:
        kind, schema = node.kind(), node.schema()
        inputs = tuple(value.debugName() for value in node.inputs())
        outputs = tuple(value.debugName() for value in node.outputs())
        match kind:
            case "prim::Constant":
                return (
                    []
                    if node.output().type().kind() == "FunctionType"
                    else self._constant(node.output().toIValue(), outputs[0])
                )
            case "prim::GetAttr" | "prim::SetAttr":
                return self._attribute(node, inputs, outputs)
            case "prim::If" | "prim::Loop":
                blocks = [(block, [value.debugName() for value in block.inputs()]) for block in node.blocks()]
                return [_Step(kind, inputs, outputs, None, tuple(self._block(*each, always=False) for each in blocks))]
            case "prim::TupleConstruct":
                named = re.search(r"NamedTuple\((.*)\) = prim::TupleConstruct", str(node))
                if named is None:
                    return [_Step(kind, inputs, outputs)]
                fields = tuple(re.findall(r"(\w+) : ", named[1]))
                return [_Step(kind, inputs, outputs, (node.output().type().annotation_str.split(".")[-1], fields))]
            case "prim::ListUnpack" | "prim::TupleUnpack":
                return [_Step(kind, inputs, outputs)]
        operator = kind if schema == "(no schema)" else schema.partition("(")[0]
        if always:
            operator_of(operator)
        return [_Step(operator, inputs, outputs)]

    def _attribute(self, node: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> list[_Step]:
        """Tensors, `training` and dicts are read, and buffers set, when the network runs; the rest are constants."""
        kind, name, owner = node.kind(), node.s("name"), self._modules.get(inputs[0])
        if owner is None:
            raise unreadable(f"{kind} of {name}")
        path = f"{owner}.{name}".lstrip(".")
        if path in self._scripts:
            self._modules[outputs[0]] = path
            return []
        if path in self._tensors or (name == "training" and outputs):
            return [_Step(kind, inputs[1:], outputs, path)]
        if kind == "prim::SetAttr":
            raise unreadable(f"{kind} of {name}")
        value = self._scripts[owner]._c.getattr(name)
        if isinstance(value, dict):  # such as what is kept from one run to the next
            setattr(self._network.get_submodule(owner), name, value)
            return [_Step(kind, (), outputs, path)]
        return self._constant(value, outputs[0])

    def _constant(self, value: Any, output: str) -> list[_Step]:
        if isinstance(value, Tensor):
            return [_Step("prim::GetAttr", (), (output,), self._register(value))]
        if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            names = tuple(f"{output}[{index}]" for index in range(len(value)))
            items = [step for name, item in zip(names, value, strict=True) for step in self._constant(item, name)]
            construct = "prim::ListConstruct" if isinstance(value, list) else "prim::TupleConstruct"
            return [*items, _Step(construct, names, (output,))]
        if isinstance(value, torch._C.ScriptObject):
            raise unreadable(f"a constant of type {value._type()}")
        return [_Step("prim::Constant", (), (output,), value)]

    def _register(self, tensor: Tensor) -> str:
        """The name under which `tensor` is a parameter or a buffer of the network."""
        if id(tensor) not in self._constants:
            name = next(
                name for name in map("constant_{}".format, itertools.count()) if not hasattr(self._network, name)
            )
            copied = tensor.detach().clone()
            if copied.is_floating_point() and copied.dim():
                self._network.register_parameter(name, nn.Parameter(copied, requires_grad=False))
            else:
                self._network.register_buffer(name, copied)
            self._constants[id(tensor)] = name, tensor
        return self._constants[id(tensor)][0]
