"""Rounding a network once more for one allocation, layer after layer, each for the inputs that it will get.

A layer is given what the layers before it, quantized, make of the calibration images. Its
weight is moved, by ridge regression, to what gives from those inputs the outputs that the
full-precision layer gives from its own, and is then rounded; its bias makes the mean output
that of full precision. So each layer makes up for what those before it have lost (as do GPTAQ,
Li et al. 2025, and Qronos, Zhang et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tap_eval.device import widest
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.program import Program, bind
from tap_eval.quantization.calibration import HELD_OUT, Sums, block_of
from tap_eval.quantization.gptq import PASSES, Factor, thinning, ungrouped
from tap_eval.quantization.quantizer import (
    Allocation,
    LayerBits,
    QuantizedLayer,
    QuantizedNetwork,
    QuantizedWeight,
    output_mean,
)
from tap_eval.quantization.rounding import Rounded, error, grouped, nearest

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
    diagonal, 0 where none was chosen. `memory` bounds the moments of a layer, in bytes. A layer that
    is worse than the nearest on images that were left out, or that none of the images reaches,
    stays as `network` rounds it. `network` is left with the finished weights; `advance` is called after each layer.
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
    affine = layer.affine
    assert affine is not None
    inputs = [(affine.centred(x).mul_(affine.scale), other) for x, other in pairs]
    count = sum(len(x) for x, _ in inputs)
    held, block = count // HELD_OUT, block_of(layer.layer, memory // 4)
    damping = damping if held and damping else _DAMPING
    kept = _summed(layer, inputs, held, count, block)
    moments, lost, sums = kept.moments(), kept.lost(), [kept]
    whole = _Rows.of(layer.layer.weight, bits, before.scale)
    if held:
        left_out = _summed(layer, inputs, 0, held, block)
        theirs, their_lost = left_out.moments(), left_out.lost()
        every = thinning(whole.weight, len(lost))
        some = whole.thinned(len(lost), every)
        tried = some.rounded(moments.matrix, lost[:, :, ::every], damping, passes=0)
        off, plain = (
            some.off(each, theirs.matrix, their_lost[:, :, ::every])
            for each in (tried, nearest(some.weight, some.bits))
        )
        if off > plain:
            return _with_bias(layer, before, before.bits, [kept, left_out])
        share = kept.count / (kept.count + left_out.count)
        moments, lost = moments + theirs, lost.mul_(share).add_(their_lost, alpha=1 - share)
        sums = [kept, left_out]
    return _with_bias(layer, whole.rounded(moments.matrix, lost, damping), before.bits, sums)


@dataclass(frozen=True)
class _Rows:
    """Output channels of a layer: its weight (O, ...), and for each the bits and the scale to begin with."""

    weight: Tensor
    bits: list[int]
    scale: Tensor

    @staticmethod
    def of(weight: Tensor, bits: LayerBits, scale: Tensor) -> _Rows:
        return _Rows(weight, [bits] * len(weight) if isinstance(bits, int) else list(bits), scale)

    def thinned(self, groups: int, every: int) -> _Rows:
        """Each so-manyth of each group."""
        places = torch.arange(len(self.weight)).view(groups, -1)[:, ::every].flatten()
        return _Rows(self.weight[places], [self.bits[place] for place in places.tolist()], self.scale[places])

    def rounded(self, moments: Tensor, lost: Tensor, damping: float, passes: int = PASSES) -> Rounded:
        """`W + W C (H + r I)^-1` rounded, with `lost` the `W C` and `r` the damping of the moments `H`."""
        factor = Factor.of(moments, damping)
        moved = grouped(self.weight, moments) + factor.divided(lost)
        tops = 2.0 ** (torch.tensor(self.bits, device=self.weight.device).view(len(moved), -1) - 1) - 1
        return ungrouped(*factor.rounded(moved, self.scale.view(len(moved), -1), tops, passes), self.weight)

    def off(self, rounded: Rounded, moments: Tensor, lost: Tensor) -> float:
        """Mean squared difference from the full-precision output, up to what does not depend on what is rounded.

        With `x` the input, `x + d` that in full precision and `e = Q - W` it is that of `e x - W d`.
        """
        mixed = (grouped(rounded.real() - self.weight, moments) * lost).sum(dtype=widest(moments.device))
        return error(self.weight, rounded, moments) - 2 * float(mixed)


def _summed(layer: QuantizedLayer, inputs: Sequence[Pair], start: int, stop: int, block: int) -> Sums:
    """Of the images from `start` to `stop`."""
    sums = Sums(layer.layer, layer.seen.mean_patch, block, compared=True)
    before = 0
    for x, other in inputs:
        part = slice(max(start - before, 0), max(stop - before, 0))
        if len(x[part]):
            sums.take(x[part], other[part])
        before += len(x)
    return sums


def _with_bias(layer: QuantizedLayer, rounded: Rounded, bits: Tensor, sums: Sequence[Sums]) -> QuantizedWeight:
    """With the bias that makes the mean output that of full precision."""
    total = sum(each.count for each in sums)
    weight = layer.layer.weight
    shift = torch.zeros(len(weight), device=weight.device)
    for each in sums:
        share = each.count / total
        shift += share * (output_mean(weight, each.other_mean) - output_mean(rounded.real(), each.mean))
    bias = shift if layer.layer.bias is None else layer.layer.bias + shift
    return QuantizedWeight(rounded.integers, rounded.scale, bias, bits)


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
