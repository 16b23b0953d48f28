"""A network's own copy: what its code holds of itself, hooks and functions included, belongs to the copy."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from tap_eval.mistake import NetworkMistake
from tap_eval.preparing.tracing import tensors_at


def unwrapped(network: nn.Module) -> nn.Module:
    """Without `torch.compile` and `DataParallel` around it."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = network.module
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def in_eval_mode(network: nn.Module) -> nn.Module:
    """The network itself; what `torch.export` gives is in eval mode for good, and cannot be told to."""
    with suppress(NotImplementedError):
        network.eval()
    return network


def copy_of(network: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A deep copy, with nothing compiled inside; tensors that a pass has left on modules are copied as values.

    With a `device` the tensors that modules hold are on it, in lists and dicts too; those of other objects stay.

    Functions that modules hold, as hooks or in the place of methods, refer to the copy where
    they referred to the network. Raises `NetworkMistake` for what cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        for _, value in tensors_at("", list(vars(module).values()), 4):
            if device is not None:
                memo[id(value)] = _on(device, value)
            elif not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        copied = copy.deepcopy(network, memo)
    except Exception as error:  # any class may have its own way of being copied
        raise NetworkMistake(
            f"{type(network).__name__} cannot be copied by copy.deepcopy ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): give a network that can."
        ) from error
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if child is not (inner := unwrapped(child)):
                setattr(module, name, inner)
        module._compiled_call_impl = None
        _move(vars(module), memo, 3)
    return copied


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _move(container: dict[Any, Any] | list[Any], memo: Mapping[int, Any], depth: int) -> None:
    """Puts functions that refer to the copy in the place of those that refer to what it was copied from.

    `memo` has the copies, by the `id` of what they are of. `depth` is of containers in containers.
    """
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        if isinstance(value, dict | list):
            if depth:
                _move(value, memo, depth - 1)
        elif (moved := _moved(value, memo)) is not value:
            container[key] = moved


def _moved(value: Any, memo: Mapping[int, Any]) -> Any:
    """The copy of `value`, or a function like it that refers to copies, or itself where it refers to none."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType):
        owner = _moved(value.__self__, memo)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        function = _moved(value.func, memo)
        return value if function is value.func else functools.partial(function, *value.args, **value.keywords)
    if not isinstance(value, types.FunctionType) or not value.__closure__:
        return value
    cells = [_moved_cell(cell, value, memo) for cell in value.__closure__]
    if all(cell is other for cell, other in zip(cells, value.__closure__, strict=True)):
        return value
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
    made.__kwdefaults__ = value.__kwdefaults__
    made.__dict__.update(vars(value))
    return made


def _moved_cell(cell: types.CellType, function: types.FunctionType, memo: Mapping[int, Any]) -> types.CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # not filled yet
        return cell
    moved = content if content is function else _moved(content, memo)
    return cell if moved is content else types.CellType(moved)
