"""Rounding a network once more for one allocation, layer after layer, each for the inputs that it will get.

A layer is given what the layers before it, quantized, make of the calibration images. Its
weight is moved, by ridge regression, to what gives from those inputs the outputs that the
full-precision layer gives from its own, and is then rounded; its bias makes the mean output
that of full precision. So each layer makes up for what those before it have lost (as do GPTAQ,
Li et al. 2025, and Qronos, Zhang et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.preparing.program import Environment, Program, Value, bind
from tap_eval.quantization.calibration import mean_patch
from tap_eval.quantization.factor import Factor
from tap_eval.quantization.gptq import ungrouped
from tap_eval.quantization.moments import Few, Moments, Sums, block_of, side_by_side
from tap_eval.quantization.quantizer import (
    Allocation,
    LayerBits,
    QuantizedLayer,
    QuantizedNetwork,
    QuantizedWeight,
    output_mean,
)
from tap_eval.quantization.rounding import Rounded, in_blocks

_DAMPING = 0.1
"""of the mean diagonal, for the ridge and for rounding, where none was chosen"""

_AT_ONCE = 4
"""copies of a layer's moments that are in memory while it is rounded"""


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
    bounds the moments of a layer, in bytes. A layer where it is worse, or that none of the images reaches, stays as
    its network rounds it. The networks are left with the finished weights; `advance` is called after each layer of
    each.
    """
    for network, allocation in zip(networks, allocations, strict=True):
        network.choose(allocation)
    found = [
        [layer.quantized(bits) for layer, bits in zip(network.layers, allocation.weights, strict=True)]
        for network, allocation in zip(networks, allocations, strict=True)
    ]
    for index, inputs, wanted in _walk(networks, program, pixels):
        tasks = [
            _Task(network.layers[index], allocation.weights[index], each[index], x, weights[index])
            for network, allocation, each, x, weights in zip(
                networks, allocations, dampings, inputs, found, strict=True
            )
        ]
        results = _finished(tasks, wanted, memory)
        for task, result, each, allocation in zip(tasks, results, found, allocations, strict=True):
            each[index] = result
            task.layer.take(result, allocation.activations[index])
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


def _finished(tasks: Sequence[_Task], wanted: Tensor, memory: int) -> list[QuantizedWeight]:
    """A layer's weight for its first call in each network, given the outputs that it is to have in all of them."""
    layer = tasks[0].layer.layer
    weight, middle = layer.weight, wanted.transpose(0, 1).flatten(1).mean(1)
    block, positions = block_of(layer, memory // 4), wanted.numel() // len(weight)
    centred = wanted - middle.view(-1, *[1] * (wanted.dim() - 2))
    means: list[Tensor] = []
    found: list[Rounded] = [task.before for task in tasks]
    held: list[tuple[int, Moments | Few, Tensor]] = []
    for place, task in enumerate(tasks):
        x = task.rounded_input()
        means.append(mean_patch(layer, x))
        if not math.isinf(task.damping):
            sums = Sums(layer, block, positions, compared=True)
            sums.take(x, centred)
            held.append((place, sums.moments(), sums.lost()))
        if held and (place == len(tasks) - 1 or 4 * _AT_ONCE * held[0][1].held * (len(held) + 1) > memory):
            places, moments, lost = zip(*held, strict=True)
            some = [tasks[each] for each in places]
            rounded = _rounded(weight, some, side_by_side(moments), torch.cat(lost))
            for each, its in zip(places, rounded, strict=True):
                found[each] = its
            held = []
    return [
        QuantizedWeight(its.integers, its.scale, middle - output_mean(its.real(), mean), task.before.bits)
        for its, mean, task in zip(found, means, tasks, strict=True)
    ]


def _rounded(weight: Tensor, tasks: Sequence[_Task], moments: Moments | Few, lost: Tensor) -> list[Rounded]:
    """Moved and rounded, of several networks side by side."""
    device, groups = weight.device, len(moments.mean) // len(tasks)
    damping = torch.tensor([task.damping or _DAMPING for task in tasks], device=device)
    factor = Factor.of(moments, damping.repeat_interleave(groups).view(-1, 1, 1))
    rows = in_blocks(weight, groups, *moments.mean.shape[1:]).repeat(len(tasks), 1, 1, 1)
    moved = factor.moved(rows, lost)
    bits = [torch.tensor(task.bits, device=device).expand(len(weight)) for task in tasks]
    tops = (2.0 ** (torch.cat(bits) - 1) - 1).view(len(moved), -1)
    scale = torch.cat([task.before.scale for task in tasks]).view(len(moved), -1)
    integers, scales = (each.split(groups) for each in factor.rounded(moved, scale, tops))
    return [ungrouped(whole, its, weight) for whole, its in zip(integers, scales, strict=True)]


def _positions(layer: Quantizable, x: Tensor) -> Tensor:
    """An input that can be joined with others, along its first dimension."""
    return x.flatten(0, -2) if isinstance(layer, nn.Linear) else x


def _walk(
    networks: Sequence[QuantizedNetwork], program: Program | None, pixels: Tensor
) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """Each layer by index, in the order in which they run first, with its input in every network, and its output in
    full precision; it may be changed meanwhile."""
    if program is None:
        yield from _walk_again(networks, pixels)
        return
    layers, parts = networks[0].prepared.modules, pixels.split(program.batch)
    theirs, *mine = ([program.begin(program.padded(part)) for part in parts] for _ in range(len(networks) + 1))
    steps = zip(bind(program, layers).steps, *(network.bound(program).steps for network in networks), strict=True)
    met: set[int] = set()

    def joined(layer: int, known: list[Environment], value: Value) -> Tensor:
        pairs = zip(known, parts, strict=True)
        return torch.cat([_positions(layers[layer], _own(each[value], part, program)) for each, part in pairs])

    for other, *own in steps:
        for known in theirs:
            other.run(known)
        if other.layer is not None and other.layer not in met:
            met.add(other.layer)
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
    for index, layer in enumerate(prepared.modules):
        reached = []
        for part in pixels.split(prepared.batch):
            several = [prepared.modules, *(network.layers for network in networks)]
            found = [_input(prepared, layers, index, part) for layers in several]
            inputs = [x for x in found if x is not None]
            if len(inputs) == len(found) and len({x.shape for x in inputs}) == 1:
                reached.append([_positions(layer, x) for x in (layer(inputs[0]), *inputs[1:])])
        if reached:
            wanted, *each = (torch.cat(its) for its in zip(*reached, strict=True))
            yield index, each, wanted


def _input(
    prepared: Prepared, layers: Sequence[Callable[[Tensor], Tensor]], index: int, pixels: Tensor
) -> Tensor | None:
    def stop(x: Tensor) -> Tensor:
        raise _Reached(x)

    try:
        prepared(pixels, [*layers[:index], stop, *layers[index + 1 :]])
    except _Reached as reached:
        return reached.x
    return None
