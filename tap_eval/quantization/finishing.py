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

import torch
from torch import Tensor, nn

from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.preparing.program import Program, bind
from tap_eval.quantization.calibration import Sums, block_of
from tap_eval.quantization.gptq import Factor, ungrouped
from tap_eval.quantization.quantizer import (
    Allocation,
    LayerBits,
    QuantizedLayer,
    QuantizedNetwork,
    QuantizedWeight,
    output_mean,
)
from tap_eval.quantization.rounding import Rounded, grouped

_DAMPING = 0.1
"""of the mean diagonal, for the ridge and for rounding, where none was chosen"""

Pair = tuple[Tensor, Tensor]
"""A layer's input in the quantized network and in full precision, of the same images."""


@torch.inference_mode()
def finish(
    network: QuantizedNetwork,
    program: Program | None,
    pixels: Tensor,
    allocation: Allocation,
    dampings: Sequence[float],
    memory: int,
    advance: Callable[[], None] = lambda: None,
) -> list[QuantizedWeight]:
    """The weights of every layer for `allocation`, from calibration images (N, C, H, W).

    `program` is the network's, None where its steps cannot be recorded: it is then run from the
    start for each layer. `dampings` are those of the moments of each layer, parts of the mean
    diagonal, 0 where none was chosen, and infinite where GPTQ is worse than the nearest. `memory`
    bounds the moments of a layer, in bytes. A layer where it is worse, or that none of the images
    reaches, stays as `network` rounds it. `network` is left with the finished weights; `advance` is called after each
    layer.
    """
    network.choose(allocation)
    found = [layer.quantized(bits) for layer, bits in zip(network.layers, allocation.weights, strict=True)]
    for index, pairs in _walk(network, program, pixels):
        layer = network.layers[index]
        found[index] = _finished(layer, allocation.weights[index], dampings[index], pairs, found[index], memory)
        layer.take(found[index], allocation.activations[index])
        advance()
    return found


def _finished(
    layer: QuantizedLayer,
    bits: LayerBits,
    damping: float,
    pairs: Sequence[Pair],
    before: QuantizedWeight,
    memory: int,
) -> QuantizedWeight:
    """A layer's weight for its first call, given the weight that it has without all this."""
    affine, weight = layer.affine, layer.layer.weight
    assert affine is not None
    sums = Sums(layer.layer, layer.seen.mean_patch, block_of(layer.layer, memory // 4), compared=True)
    x, other = (torch.cat([_positions(layer.layer, each) for each in parts]) for parts in zip(*pairs, strict=True))
    sums.take(affine.centred(x).mul_(affine.scale), other)
    if math.isinf(damping):
        return _with_bias(layer, before, before.bits, sums)
    moments, lost = sums.moments().matrix, sums.lost()
    factor = Factor.of(moments, damping or _DAMPING)
    moved = grouped(weight, moments) + factor.divided(lost)
    tops = 2.0 ** (torch.tensor(bits, device=weight.device).expand(len(weight)) - 1) - 1
    scale, tops = (each.view(len(moved), -1) for each in (before.scale, tops))
    rounded = ungrouped(*factor.rounded(moved, scale, tops), weight)
    return _with_bias(layer, rounded, before.bits, sums)


def _positions(layer: Quantizable, x: Tensor) -> Tensor:
    """An input that can be joined with others, along its first dimension."""
    return x.flatten(0, -2) if isinstance(layer, nn.Linear) else x


def _with_bias(layer: QuantizedLayer, rounded: Rounded, bits: Tensor, sums: Sums) -> QuantizedWeight:
    """With the bias that makes the mean output that of full precision."""
    weight, bias = layer.layer.weight, layer.layer.bias
    shift = sums.mean_apart + output_mean(weight - rounded.real(), sums.mean)
    return QuantizedWeight(rounded.integers, rounded.scale, shift if bias is None else bias + shift, bits)


def _walk(network: QuantizedNetwork, program: Program | None, pixels: Tensor) -> Iterator[tuple[int, list[Pair]]]:
    """Each layer by index, in the order in which they run first, with its inputs; it may be changed meanwhile."""
    if program is None:
        yield from _walk_again(network, pixels)
        return
    parts = pixels.split(program.batch)
    mine, theirs = ([program.begin(program.padded(part)) for part in parts] for _ in range(2))
    steps = zip(network.bound(program).steps, bind(program, network.prepared.modules).steps, strict=True)
    met: set[int] = set()
    for step, other in steps:
        if step.layer is not None and step.layer not in met:
            met.add(step.layer)
            value = step.args[0]
            yield (
                step.layer,
                [
                    (_own(known[value], part, program), _own(beside[value], part, program))
                    for known, beside, part in zip(mine, theirs, parts, strict=True)
                ],
            )
        for known, beside in zip(mine, theirs, strict=True):
            step.run(known)
            other.run(beside)


def _own(value: Tensor, part: Tensor, program: Program) -> Tensor:
    """Without the rows of the images that fill up a batch."""
    each, rest = divmod(len(value), program.batch)
    return value if rest else value[: each * len(part)]


class _Reached(BaseException):
    """Ends a pass at a layer, whose input it holds; no code of a network catches it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def _walk_again(network: QuantizedNetwork, pixels: Tensor) -> Iterator[tuple[int, list[Pair]]]:
    """The same by passes that end at the layer."""
    prepared = network.prepared
    for index in range(len(prepared.layers)):
        inputs = [
            [_input(prepared, layers, index, part) for layers in (network.layers, prepared.modules)]
            for part in pixels.split(prepared.batch)
        ]
        pairs = [(x, other) for x, other in inputs if x is not None and other is not None and x.shape == other.shape]
        if pairs:
            yield index, pairs


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
