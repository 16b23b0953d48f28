"""Post-training quantization of a prepared network, and switching between allocations.

Weights are symmetric integers per output channel, with the scale of least squared error.
Activations are affine integers per tensor, their range from the calibration images. The
shift that quantized weights add to a channel's mean output is taken out of the bias. Every
(layer, bits) is quantized once and kept: choosing an allocation swaps tensors.

This is the simulated path: whole numbers held in floats, whose products and sums are exact
as long as floats are, scaled afterwards in the order in which oneDNN does it. It defines what
is right; a faster path has to agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.images.images import Images
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable

VERSION = 3
"""Part of the key of every stored measurement: raise it when a change here changes results."""
_AT_ONCE = 2**16
"""weights that are quantized together: as many as stay in a core's cache"""


LayerBits = int | tuple[int, ...]
"""Weight bits of one layer: of all of it, or one number an output channel."""


@dataclass(frozen=True)
class Allocation:
    """Bits a layer, in the order of the layers, for its weights and for its input activations."""

    weights: tuple[LayerBits, ...]
    activations: tuple[int, ...]

    @property
    def most(self) -> int:
        """The most bits of any weight."""
        return max(bits if isinstance(bits, int) else max(bits) for bits in self.weights)


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric integers per output channel with the scale of least squared error.

    `weight` is (O, ...); returns `integers` of its shape, float32 with whole values within
    +-(2^(bits-1) - 1), and `scale` (O,), so that `weight` is near `integers * scale`. Scales
    from a grid are each improved by alternating rounding with the exact least-squares scale
    for the rounded values; the best is kept.
    """
    rows = max(_AT_ONCE // weight[0].numel(), 1)
    parts = [_quantized(part, bits) for part in weight.split(rows)]
    return torch.cat([integers for integers, _ in parts]), torch.cat([scale for _, scale in parts])


def _quantized(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    flat = weight.flatten(1).double()
    top = 2 ** (bits - 1) - 1
    peak = flat.abs().amax(1, keepdim=True).clamp_min(1e-12)
    best_error = torch.full((len(flat), 1), torch.inf, dtype=torch.float64, device=flat.device)
    best_scale = peak / top
    for shrink in torch.linspace(0.3, 1.1, 33).tolist():
        scale = peak * shrink / top
        for _ in range(4):
            integers = (flat / scale).round().clamp(-top, top)
            square = integers.square().sum(1, keepdim=True)
            scale = torch.where(square > 0, (flat * integers).sum(1, keepdim=True) / square.clamp_min(1), scale)
        integers = (flat / scale).round().clamp(-top, top)
        error = (flat - integers * scale).square().sum(1, keepdim=True)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    integers = (flat / best_scale).round().clamp(-top, top)
    return integers.float().view_as(weight), best_scale.squeeze(1).float()


@dataclass(frozen=True)
class QuantizedWeight:
    """`integers` (O, ...) int8 and `scale` (O,), and a `bias` (O,) that makes up for the mean that they shift."""

    integers: Tensor
    scale: Tensor
    bias: Tensor

    def real(self) -> Tensor:
        """The weight that the integers stand for, float32."""
        return self.integers * self.scale.view(-1, *[1] * (self.integers.dim() - 1))


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

    def centred(self, x: Tensor) -> Tensor:
        """`x` as whole numbers `integer - zero_point`, in float32."""
        integers = x.mul(1 / self.scale).add_(self.zero_point).round_().clamp_(0, 2**self.bits - 1)
        return integers.sub_(self.zero_point)


@dataclass(frozen=True)
class Observation:
    """What the calibration images showed of a layer's input."""

    low: float
    high: float
    mean_patch: Tensor
    """mean input seen by each weight of an output channel, padding included; a filter's shape, groups stacked"""
    count: int
    """positions of the output that the mean is over"""

    def __add__(self, other: Observation) -> Observation:
        """What two calls of the layer showed."""
        count = self.count + other.count
        mean_patch = (self.mean_patch * self.count + other.mean_patch * other.count) / count
        return Observation(min(self.low, other.low), max(self.high, other.high), mean_patch, count)


Integers = Callable[[int], tuple[Tensor, Tensor]]
"""A layer's integers, int8, and scale at some bits; they do not depend on the calibration."""


def integers_of(layer: Quantizable) -> Integers:
    """Those of `layer`, each computed once and kept."""

    @cache
    def integers(bits: int) -> tuple[Tensor, Tensor]:
        found, scale = quantize_weight(layer.weight, bits)
        return found.to(torch.int8), scale

    return integers


class QuantizedLayer(nn.Module):
    """Stands in a network for one layer; full precision until `choose` gives it bits."""

    def __init__(self, layer: Quantizable, seen: Observation, integers: Integers) -> None:
        super().__init__()
        self.layer = layer
        self.seen = seen
        self._integers = integers
        self.affine: Affine | None = None
        self._weights: dict[int, QuantizedWeight] = {}
        self._now: tuple[Tensor, Tensor | None] = (layer.weight, layer.bias)
        self._scale: Tensor | None = None

    def choose(self, weight_bits: LayerBits | None, activation_bits: int | None) -> None:
        """Sets the bits; `None` leaves the weights, or the input activations, in full precision."""
        self.affine = (activation_bits and self.covering(activation_bits)) or None
        self._scale = None
        weight, bias = self.layer.weight, self.layer.bias
        if weight_bits is not None:
            quantized = self.quantized(weight_bits)
            weight, bias = quantized.real(), quantized.bias
            if self.affine:
                weight, self._scale = quantized.integers.float(), quantized.scale
        elif self.affine:
            weight = weight * self.affine.scale
        self._now = weight, bias

    def covering(self, bits: int) -> Affine:
        """The integers of the layer's input."""
        return Affine.covering(self.seen.low, self.seen.high, bits)

    def quantized(self, bits: LayerBits) -> QuantizedWeight:
        """The quantized weight; of mixed bits, each output channel is that of its own, since they do not interact."""
        if isinstance(bits, tuple):
            return self._mixed(bits)
        if bits not in self._weights:
            integers, scale = self._integers(bits)
            weight = QuantizedWeight(integers, scale, torch.zeros_like(scale))
            shift = output_mean(weight.real() - self.layer.weight, self.seen.mean_patch)
            bias = -shift if self.layer.bias is None else self.layer.bias - shift
            self._weights[bits] = QuantizedWeight(integers, scale, bias)
        return self._weights[bits]

    def _mixed(self, bits: tuple[int, ...]) -> QuantizedWeight:
        chosen = torch.tensor(bits, device=self.layer.weight.device)
        first = self.quantized(bits[0])
        mixed = QuantizedWeight(first.integers.clone(), first.scale.clone(), first.bias.clone())
        for other in set(bits) - {bits[0]}:
            rows, quantized = chosen == other, self.quantized(other)
            mixed.integers[rows] = quantized.integers[rows]
            mixed.scale[rows], mixed.bias[rows] = quantized.scale[rows], quantized.bias[rows]
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._now
        if self.affine is not None:
            x = self.affine.centred(x)
        if self._scale is None:
            return self._product(x, weight, bias)
        assert self.affine is not None
        assert bias is not None
        each = (-1, 1, 1) if isinstance(self.layer, nn.Conv2d) else (-1,)
        y = self._product(x, weight, None)
        return y.mul_(self.affine.scale).mul_(self._scale.view(each)).add_(bias.view(each))

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, bias)
        return F.linear(x, weight, bias)


def output_mean(weight: Tensor, mean_patch: Tensor) -> Tensor:
    """Mean output (O,) of a layer with `weight`, without bias, on inputs whose mean patch is given."""
    groups = len(mean_patch) // weight.shape[1]
    patches = mean_patch.view(groups, 1, -1)
    return (weight.view(groups, weight.shape[0] // groups, -1) * patches).sum(-1).flatten()


def observe(layer: Quantizable, x: Tensor) -> Observation:
    """The range and mean patch of `x`, a layer's input on all calibration images."""
    low, high = (float(value) for value in torch.aminmax(x))
    if isinstance(layer, nn.Linear):
        return Observation(low, high, x.flatten(0, -2).mean(0), x.numel() // layer.in_features)
    (rows, cols), (down, right) = layer.kernel_size, layer.stride
    height, width = layer._conv_forward(x[:1], layer.weight, layer.bias).shape[-2:]
    padded = F.pad(x, layer._reversed_padding_repeated_twice)
    taps = [
        padded[:, :, row * layer.dilation[0] :: down, col * layer.dilation[1] :: right][..., :height, :width]
        for row in range(rows)
        for col in range(cols)
    ]
    means = torch.stack([tap.mean(dim=(0, 2, 3)) for tap in taps], dim=1)
    return Observation(low, high, means.view(-1, rows, cols), len(x) * height * width)


@torch.no_grad()
def calibrate(prepared: Prepared, pixels: Tensor) -> list[Observation]:
    """What each layer's input is on the calibration images, in all calls of it, in the order of the layers.

    A layer that none of them reaches is observed on the images on which it was found. Raises
    `RuntimeError` where it is not reached by those either, as in a process without the network's globals.
    """
    seen: dict[int, Observation] = {}

    def watched(index: int, module: Quantizable) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            if index in missing:
                found = observe(module, x)
                seen[index] = seen[index] + found if index in seen else found
            return module(x)

        return call

    for part in (pixels, *prepared.watched):
        if missing := set(range(len(prepared.layers))) - seen.keys():
            prepared(part, [watched(index, module) for index, module in enumerate(prepared.modules)])
    if silent := [layer.name for layer in prepared.layers if layer.index not in seen]:
        raise RuntimeError(f"{', '.join(silent)} ran when the network was prepared, and not in this process")
    return [seen[index] for index in range(len(prepared.layers))]


class QuantizedNetwork:
    """A network whose layers can be given any bits, again and again."""

    def __init__(
        self, prepared: Prepared, seen: Sequence[Observation], integers: Sequence[Integers] | None = None
    ) -> None:
        """`integers` are those of the layers, to be shared by networks that differ in their calibration."""
        integers = integers or [integers_of(module) for module in prepared.modules]
        self.prepared = prepared
        self.layers = [QuantizedLayer(*parts) for parts in zip(prepared.modules, seen, integers, strict=True)]

    def choose(self, allocation: Allocation | None) -> None:
        """Gives every layer its bits; `None` is full precision."""
        for index, layer in enumerate(self.layers):
            if allocation is None:
                layer.choose(None, None)
            else:
                layer.choose(allocation.weights[index], allocation.activations[index])

    @torch.inference_mode()
    def logits(self, pixels: Tensor | Images, batch: int) -> Tensor:
        """(N, C, H, W) float32 to (N, classes), in batches of `batch`."""
        return torch.cat([self.prepared(part, self.layers) for part in pixels.split(batch)])
