"""Rounding a network once more for one allocation, layer after layer, each for the inputs that it will get.

A layer is given what the layers before it, quantized, make of the calibration images. Its
weight is moved, by ridge regression, to what gives from those inputs the outputs that the
full-precision layer gives from its own, and is then rounded; its bias makes the mean output
that of full precision. So each layer makes up for what those before it have lost (as do GPTAQ,
Li et al. 2025, and Qronos, Zhang et al. 2025).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tap_eval.preparing.operands import Operand
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.preparing.program import Environment, Program, Value, bind
from tap_eval.quantization.calibration import mean_patch
from tap_eval.quantization.factor import Factor
from tap_eval.quantization.gptq import ungrouped
from tap_eval.quantization.moments import Few, Moments, Sums, block_of
from tap_eval.quantization.quantizer import (
    Allocation,
    LayerBits,
    QuantizedLayer,
    QuantizedNetwork,
    QuantizedWeight,
    output_mean,
)
from tap_eval.quantization.rounding import Rounded, in_blocks

VERSION = 2
"""raised whenever finished weights change"""
_DAMPING = 0.1
"""of the mean diagonal, for the ridge and for rounding, where none was chosen"""


def finish(
    network: QuantizedNetwork,
    program: Program | None,
    pixels: Tensor,
    allocation: Allocation,
    dampings: Sequence[float],
    memory: int,
    advance: Callable[[], None] = lambda: None,
) -> list[QuantizedWeight]:
    """`finish_all` for one allocation."""
    (found,) = finish_all([network], program, pixels, [allocation], [dampings], memory, advance)
    return found


@torch.inference_mode()
def finish_all(
    networks: Sequence[QuantizedNetwork],
    program: Program | None,
    pixels: Tensor,
    allocations: Sequence[Allocation],
    dampings: Sequence[Sequence[float]],
    memory: int,
    advance: Callable[[], None] = lambda: None,
) -> list[list[QuantizedWeight]]:
    """The weights of every layer for each of `allocations`, from calibration images (N, C, H, W).

    `networks` are one and the same, one for each allocation. `program` is theirs, None where its steps cannot be
    recorded: they are then run from the start for each layer. `dampings` are those of the moments of each layer,
    parts of the mean diagonal, 0 where none was chosen, and infinite where GPTQ is worse than the nearest. `memory`
    bounds the moments of a layer, in bytes. A layer where it is worse, that is called more than once, or that none
    of the images reaches, stays as its network rounds it. The networks are left with the finished weights;
    `advance` is called after each layer of each.
    """
    for network, allocation in zip(networks, allocations, strict=True):
        network.choose(allocation)
    found = [
        [layer.quantized(bits) for layer, bits in zip(network.layers, allocation.weights, strict=True)]
        for network, allocation in zip(networks, allocations, strict=True)
    ]
    for index, inputs, wanted in _walk(networks, program, pixels):
        middle = wanted.transpose(0, 1).flatten(1).mean(1)
        centred = wanted - middle.view(-1, *[1] * (wanted.dim() - 2))
        for network, allocation, each, x, weights in zip(networks, allocations, dampings, inputs, found, strict=True):
            layer = network.layers[index]
            task = _Task(layer, allocation.weights[index], each[index], x, weights[index])
            weights[index] = _finished(task, centred, middle, memory)
            layer.take(weights[index], allocation.activations[index])
            advance()
    return found


@dataclass(frozen=True)
class _Task:
    """A layer in one of the networks."""

    layer: QuantizedLayer
    bits: LayerBits
    damping: float
    x: Tensor
    """its input"""
    before: QuantizedWeight
    """the weight that it has without all this"""

    def rounded_input(self) -> Tensor:
        """What its integers stand for."""
        assert self.layer.affine is not None
        return self.layer.affine.rounded(self.x)


def _finished(task: _Task, centred: Tensor, middle: Tensor, memory: int) -> QuantizedWeight:
    """A layer's weight in a network, from the outputs that it is to have, about their mean `middle`.

    By itself, whatever else is finished: in a batch floats would be added up in another order, and from the first half
    that falls otherwise on it would be another network.
    """
    layer, x = task.layer.layer, task.rounded_input()
    weight, mean = layer.weight, mean_patch(layer, x)
    found: Rounded = task.before
    if not math.isinf(task.damping):
        positions = centred.numel() // len(weight)
        sums = Sums(layer, block_of(layer, memory // 4, positions), positions, compared=True)
        sums.take(x, centred)
        found = _rounded(weight, task, sums.moments(), sums.lost())
    return QuantizedWeight(found.integers, found.scale, middle - output_mean(found.real(), mean), task.before.bits)


def _rounded(weight: Tensor, task: _Task, moments: Moments | Few, lost: Tensor) -> Rounded:
    """Moved and rounded."""
    groups = len(moments.mean)
    factor = Factor.of(moments, task.damping or _DAMPING)
    moved = factor.moved(in_blocks(weight, *moments.mean.shape), lost)
    bits = torch.tensor(task.bits, device=weight.device).expand(len(weight))
    tops = (2.0 ** (bits - 1) - 1).view(groups, -1)
    return ungrouped(*factor.rounded(moved, task.before.scale.view(groups, -1), tops), weight)


def _positions(layer: Quantizable, x: Tensor) -> Tensor:
    """An input that can be joined with others, along its first dimension."""
    return x.flatten(0, -2) if isinstance(layer, nn.Linear) else x


def _walk(
    networks: Sequence[QuantizedNetwork], program: Program | None, pixels: Tensor
) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """Each layer that is called once, by index, in the order in which they run, with its input in every network, and
    its output in full precision; it may be changed meanwhile."""
    if program is None:
        yield from _walk_again(networks, pixels)
        return
    layers, parts = networks[0].prepared.modules, pixels.split(program.batch)
    theirs, *mine = ([program.begin(program.padded(part)) for part in parts] for _ in range(len(networks) + 1))
    steps = zip(bind(program, layers).steps, *(network.bound(program).steps for network in networks), strict=True)
    calls = Counter(step.layer for step in program.steps)

    def joined(layer: int, known: list[Environment], value: Value) -> Tensor:
        pairs = zip(known, parts, strict=True)
        return torch.cat([_positions(layers[layer], _own(each[value], part, program)) for each, part in pairs])

    for other, *own in steps:
        for known in theirs:
            other.run(known)
        if other.layer is not None and calls[other.layer] == 1:
            inputs = [joined(other.layer, known, other.args[0]) for known in mine]
            yield other.layer, inputs, joined(other.layer, theirs, other.value)
        for step, each in zip(own, mine, strict=True):
            for known in each:
                step.run(known)


def _own(value: Tensor, part: Tensor, program: Program) -> Tensor:
    """Without the rows of the images that fill up a batch."""
    each, rest = divmod(len(value), program.batch)
    return value if rest else value[: each * len(part)]


class _Reached(BaseException):
    """Ends a pass at a layer, whose input it holds; no code of a network catches it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def _walk_again(networks: Sequence[QuantizedNetwork], pixels: Tensor) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """The same by passes that end at the layer."""
    prepared = networks[0].prepared
    parts = pixels.split(prepared.batch)
    calls = _calls(prepared, parts)
    for index, layer in enumerate(prepared.modules):
        if calls[index] > 1:
            continue
        reached = []
        for part in parts:
            found = [_input(prepared, prepared.modules, index, part, None)]
            found += [_input(prepared, network.layers, index, part, network.operand) for network in networks]
            inputs = [x for x in found if x is not None]
            if len(inputs) == len(found) and len({x.shape for x in inputs}) == 1:
                reached.append([_positions(layer, x) for x in (layer(inputs[0]), *inputs[1:])])
        if reached:
            wanted, *each = (torch.cat(its) for its in zip(*reached, strict=True))
            yield index, each, wanted


def _calls(prepared: Prepared, parts: Sequence[Tensor]) -> Counter[int]:
    """How often each layer is called in a pass, at most."""
    most = Counter[int]()

    def counted(calls: Counter[int], index: int, layer: Quantizable, x: Tensor) -> Tensor:
        calls[index] += 1
        y: Tensor = layer(x)
        return y

    for part in parts:
        calls = Counter[int]()
        prepared(part, [partial(counted, calls, index, layer) for index, layer in enumerate(prepared.modules)])
        most |= calls
    return most


def _input(
    prepared: Prepared,
    layers: Sequence[Callable[[Tensor], Tensor]],
    index: int,
    pixels: Tensor,
    operand: Operand | None,
) -> Tensor | None:
    def stop(x: Tensor) -> Tensor:
        raise _Reached(x)

    try:
        prepared(pixels, [*layers[:index], stop, *layers[index + 1 :]], operand)
    except _Reached as reached:
        return reached.x
    return None
