"""Post-training quantization of a prepared network, and switching between allocations.

Weights are symmetric integers per output channel, rounded as `rounding` says. Activations are
affine integers per tensor, their range from the calibration images; with `Sums` so are the
values between layers that `sums` names, and where a network names its operands so are those of
products of two activations. The shift that quantized weights add to a channel's
mean output is taken out of the bias, which is a whole number of what kernels in integers add
up. Every (layer, bits) is quantized once and kept: choosing an allocation swaps tensors.

This is the simulated path: whole numbers held in floats, whose products and sums are exact
as long as floats are, scaled afterwards in the order in which oneDNN does it. It defines what
is right; a faster path has to agree with it. Tensor cores may multiply them where they give the
same whole numbers; everything else, full precision above all, is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from tap_eval.device import Form, multiply_whole
from tap_eval.images.images import Images
from tap_eval.preparing.operands import Operand
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable, multiply
from tap_eval.preparing.program import Program, Step, Value, bind, bind_operands
from tap_eval.quantization.calibration import MOST, Observation
from tap_eval.quantization.ranges import Range
from tap_eval.quantization.rounding import Rounded, nearest
from tap_eval.quantization.sums import Carried, Sums, carried, convolutions

VERSION = 10
"""Part of the key of every stored measurement: raise it when a change in this room changes results."""


LayerBits = int | tuple[int, ...]
"""Weight bits of one layer: of all of it, or one number an output channel."""


def distinct(bits: LayerBits) -> set[int]:
    """Those that some output channel has."""
    return {bits} if isinstance(bits, int) else set(bits)


@dataclass(frozen=True)
class Allocation:
    """Bits a layer, in the order of the layers, for its weights and for its input activations."""

    weights: tuple[LayerBits, ...]
    activations: tuple[int, ...]

    @property
    def most(self) -> int:
        """The most bits of any weight."""
        return max(max(distinct(bits)) for bits in self.weights)


@dataclass(frozen=True)
class Affine:
    """`real = scale * (integer - zero_point)` for integers in [0, 2^bits - 1]; `scale` is a float32."""

    scale: float
    zero_point: int
    bits: int

    @staticmethod
    def covering(low: float, high: float, bits: int) -> Affine:
        """The range [low, high], widened to hold zero, which is exact."""
        low, high = min(low, 0.0), max(high, 0.0)
        top = 2**bits - 1
        scale = torch.tensor(max((high - low) / top, 1e-12), dtype=torch.float32).item()
        return Affine(scale, min(max(round(-low / scale), 0), top), bits)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest real value."""
        low, high = (self.scale * (end - self.zero_point) for end in (0, 2**self.bits - 1))
        return low, high

    def centred(self, x: Tensor) -> Tensor:
        """`x` as whole numbers `integer - zero_point`, in float32; of two that are equally near the even one."""
        return x.mul(1 / self.scale).round_().clamp_(-self.zero_point, 2**self.bits - 1 - self.zero_point)

    def rounded(self, x: Tensor) -> Tensor:
        """What the integers of `x` stand for, float32."""
        return self.centred(x).mul_(self.scale)


_LARGEST = 64
"""of raised weights: two products of such with bytes fit into the 16 bits in which some CPUs add them"""
_MOST_UNITS = 2**30
"""of a bias, so that the sum of products fits into an int32 with it"""


def raised(bits: Tensor) -> Tensor:
    """By which power of two integers of so many bits can be larger in a kernel that takes int8, float32."""
    return (_LARGEST / (2.0 ** (bits - 1) - 1)).log2().floor().clamp_min(0).exp2()


@dataclass(frozen=True)
class QuantizedWeight(Rounded):
    """With a `bias` (O,) that makes up for the mean that the integers shift, and the `bits` (O,) that they have."""

    bias: Tensor
    bits: Tensor

    def unit(self, affine: Affine) -> Tensor:
        """What a bias is so many of in integers (O,), float32: products of raised weights and the input's integers.

        Of weights that are not raised it would be coarse: at 2 bits, many a step of the output.
        """
        return self.scale / raised(self.bits) * affine.scale

    def with_whole_bias(self, affine: Affine) -> QuantizedWeight:
        """The same for an input in these integers, its bias a whole number of units, which fit into an int32.

        Where it would be too many, the weights of that channel are made coarser by a power of two. They make next
        to nothing of the output beside such a bias: training has left the channel without use.
        """
        units = (self.bias.double() / self.unit(affine)).abs()
        coarser = (units / _MOST_UNITS).log2().ceil().clamp_min(0).exp2().float()
        integers = (self.integers / coarser.view(-1, *[1] * (self.integers.dim() - 1))).round_().to(torch.int8)
        made = replace(self, integers=integers, scale=self.scale * coarser)
        unit = made.unit(affine).double()
        return replace(made, bias=((self.bias / unit).round_() * unit).float())


Integers = Callable[[int], Rounded]
"""A layer's rounded weight at some bits."""


def nearest_of(layer: Quantizable) -> Integers:
    """That of `layer` rounded to the nearest, each computed once and kept."""
    return cache(partial(nearest, layer.weight))


class QuantizedLayer(nn.Module):
    """Stands in a network for one layer; full precision until `choose` gives it bits."""

    def __init__(self, layer: Quantizable, seen: Observation, integers: Integers) -> None:
        super().__init__()
        self.layer = layer
        self.seen = seen
        self._integers = integers
        self.affine: Affine | None = None
        """the integers of its input, None in full precision"""
        self.weight: QuantizedWeight | None = None
        """None in full precision"""
        self._weights: dict[int, QuantizedWeight] = {}
        self._now: tuple[Tensor, Tensor | None] = (layer.weight, layer.bias)
        self._scale: Tensor | None = None
        self.in_tf32: dict[Form, bool] = {}
        """whether tensor cores multiply whole numbers exactly, by the form of the input"""

    def choose(self, weight_bits: LayerBits | None, activation_bits: int | None) -> None:
        """Sets the bits; `None` leaves the weights, or the input activations, in full precision."""
        self.take(None if weight_bits is None else self.quantized(weight_bits), activation_bits)

    def take(self, quantized: QuantizedWeight | None, activation_bits: int | None) -> None:
        """The same, with the weight given."""
        self.affine = (activation_bits and self.covering(activation_bits)) or None
        self._scale = None
        if quantized is not None and self.affine:
            quantized = quantized.with_whole_bias(self.affine)
        self.weight = quantized
        weight, bias = self.layer.weight, self.layer.bias
        if quantized is not None:
            weight, bias = quantized.real(), quantized.bias
            if self.affine:
                weight, self._scale = quantized.integers.float(), quantized.scale
        elif self.affine:
            weight = weight * self.affine.scale
        self._now = weight, bias

    def covering(self, bits: int) -> Affine:
        """The integers of the layer's input."""
        return Affine.covering(*self.seen.range_at(bits), bits)

    def quantized(self, bits: LayerBits) -> QuantizedWeight:
        """The quantized weight; of mixed bits, each output channel is that of its own, since they do not interact."""
        if isinstance(bits, tuple):
            return self._mixed(bits)
        if bits not in self._weights:
            rounded = self._integers(bits)
            shift = output_mean(rounded.real() - self.layer.weight, self.seen.mean_patch)
            bias = -shift if self.layer.bias is None else self.layer.bias - shift
            self._weights[bits] = QuantizedWeight(
                rounded.integers, rounded.scale, bias, torch.full_like(bias, bits, dtype=torch.int8)
            )
        return self._weights[bits]

    def _mixed(self, bits: tuple[int, ...]) -> QuantizedWeight:
        chosen = torch.tensor(bits, device=self.layer.weight.device)
        mixed = self.quantized(bits[0])
        each = (-1, *[1] * (mixed.integers.dim() - 1))
        for other in set(bits) - {bits[0]}:
            rows, quantized = chosen == other, self.quantized(other)
            mixed = QuantizedWeight(
                torch.where(rows.view(each), quantized.integers, mixed.integers),
                torch.where(rows, quantized.scale, mixed.scale),
                torch.where(rows, quantized.bias, mixed.bias),
                torch.where(rows, quantized.bits, mixed.bits),
            )
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._now
        if self.affine is not None:
            x = self.affine.centred(x)
        if self._scale is None:
            return multiply(self.layer, x, weight, bias)
        assert self.affine is not None
        assert bias is not None
        each = (-1, 1, 1) if isinstance(self.layer, nn.Conv2d) else (-1,)
        y = multiply_whole(lambda x, weight: multiply(self.layer, x, weight, None), x, weight, self.in_tf32)
        return y.mul_(self.affine.scale).mul_(self._scale.view(each)).add_(bias.view(each))


def output_mean(weight: Tensor, mean_patch: Tensor) -> Tensor:
    """Mean output (O,) of a layer with `weight`, without bias, on inputs whose mean patch is given."""
    groups = len(mean_patch) // weight.shape[1]
    patches = mean_patch.view(groups, 1, -1)
    return (weight.view(groups, weight.shape[0] // groups, -1) * patches).sum(-1).flatten()


class QuantizedNetwork:
    """A network whose layers can be given any bits, again and again."""

    def __init__(
        self,
        prepared: Prepared,
        seen: Sequence[Observation],
        integers: Sequence[Integers] | None = None,
        sums: Sums | None = None,
        operands: Sequence[Range] = (),
    ) -> None:
        """`integers` are those of the layers, rounded to the nearest if they are not given.

        Without `sums` all that travels between layers is in float32, but for what they read. `operands` are the ranges
        of those that the network names.
        """
        integers = integers or [nearest_of(module) for module in prepared.modules]
        self.prepared = prepared
        self.sums = sums
        self.layers = [QuantizedLayer(*parts) for parts in zip(prepared.modules, seen, integers, strict=True)]
        self.operand_ranges = tuple(operands)
        self.operands = [Affine.covering(*ends, MOST) for ends, _ in zip(operands, prepared.operands, strict=True)]
        """the integers of each operand of a product of two activations, unless all is in full precision"""
        self._in_full = True

    def choose(self, allocation: Allocation | None) -> None:
        """Gives every layer its bits; `None` is full precision."""
        self._in_full = allocation is None
        for index, layer in enumerate(self.layers):
            if allocation is None:
                layer.choose(None, None)
            else:
                layer.choose(allocation.weights[index], allocation.activations[index])

    def take(self, weights: Sequence[QuantizedWeight], activations: Sequence[int]) -> None:
        """Gives every layer its weight, and the bits of its input."""
        self._in_full = False
        for layer, weight, bits in zip(self.layers, weights, activations, strict=True):
            layer.take(weight, bits)

    def carried(self, steps: Sequence[Step], result: Value) -> list[tuple[Carried, Affine]]:
        """What travels in integers between the layers, of `steps` to `result`, and in which: none without `sums`.

        A layer that alone reads a value may have other bits than the 8 of these integers: it then rounds the value
        to its own. Raises `ValueError` for the steps of another network.
        """
        if self.sums is None:
            return []
        found = carried(steps, convolutions(self.prepared.modules), result)
        own = [each for each in found if each.layer is None]
        ranges = dict(zip(own, self.sums.ranges, strict=True))
        return [
            (each, self.layers[each.layer].covering(8))
            if each.layer is not None
            else (each, Affine.covering(*ranges[each], 8))
            for each in found
        ]

    def rounded_in(self, program: Program) -> dict[Value, Affine]:
        """The values that are rounded as soon as they are computed, by no layer that reads them, and to what."""
        return {each.value: affine for each, affine in self.carried(program.steps, program.logits) if not each.alone}

    def multiplied(self, program: Program) -> Program:
        """The network's program with operands as what their integers stand for."""
        return bind_operands(program, [affine.rounded for affine in self.operands])

    @property
    def operand(self) -> Operand | None:
        """What is multiplied in the place of operands, None where that is they themselves."""
        if self._in_full or not self.operands:
            return None
        return lambda number, x: self.operands[number].rounded(x)

    def bound(self, program: Program) -> Program:
        """The network's program with what every layer, every operand and every sum now is."""
        bound = bind(program, self.layers)
        if self._in_full:
            return bound
        bound = self.multiplied(bound)
        integers = self.rounded_in(program)
        return replace(bound, steps=tuple(_rounded(step, integers.get(step.value)) for step in bound.steps))

    @torch.inference_mode()
    def logits(self, pixels: Tensor | Images, batch: int) -> Tensor:
        """(N, C, H, W) float32 to (N, classes), in batches of `batch`; whatever autocast is on, in float32."""
        with torch.autocast(self.prepared.device.type, enabled=False):
            if self.sums is None or self._in_full or not len(pixels):
                return torch.cat([self.prepared(part, self.layers, self.operand) for part in pixels.split(batch)])
            program = self.bound(self.sums.recorded(batch))
            parts = [program.run(program.begin(program.padded(part)))[: len(part)] for part in pixels.split(batch)]
            return torch.cat(parts)


def _rounded(step: Step, affine: Affine | None) -> Step:
    """The step, which gives what is nearest in the integers of `affine` to what it computes."""
    if affine is None:
        return step
    function, rounded = step.function, affine.rounded
    return replace(step, function=lambda *args, **kwargs: rounded(function(*args, **kwargs)))
