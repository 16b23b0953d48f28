"""The fast path on CPUs: quantized layers multiplied in 8-bit integers by oneDNN.

A network's program is rewritten for it, as `rewriting` says. It computes what the simulated
path computes, up to the order of additions in float32. Products of two activations, whose
operands are in integers where a network names them, are made of the floats that these stand for.
The operators are those that PyTorch's
own quantization for x86 uses, on plain tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from tap_eval.images.images import Images
from tap_eval.preparing.program import Program
from tap_eval.quantization.quantizer import (
    Affine,
    Allocation,
    LayerBits,
    QuantizedLayer,
    QuantizedNetwork,
    QuantizedWeight,
)
from tap_eval.quantization.rewriting import in_bytes, with_padding_in_layers

_ONEDNN = torch.ops.onednn
_HALF = 64
"""two products of a byte and such a weight fit into 16 bits when they are added"""


@cache
def exact(bits: int = 8) -> bool:
    """Whether this CPU multiplies bytes by weights of `bits`, as layers have them: those too large for it in halves."""
    return _multiplies(min(2 ** (bits - 1) - 1, _HALF))


@cache
def saturates() -> bool:
    """Whether this CPU, as those without VNNI do, adds pairs of products in 16 bits: large weights overflow."""
    return not _multiplies(2 * _HALF - 1)


def _multiplies(weight: int) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    x, weights = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((8, 64), weight, dtype=torch.int8)
    scale, zero = torch.ones(8), torch.zeros(8, dtype=torch.int32)
    try:
        packed = _ONEDNN.qlinear_prepack(weights, None)
        y = _ONEDNN.qlinear_pointwise(x, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
    except (RuntimeError, AttributeError):  # a build of PyTorch without these operators
        return False
    return bool((y == 64 * 255 * weight).all())


def _twice(x: Tensor) -> Tensor:
    """(N, C, H, W) or (..., C) uint8 with every channel twice, one beside the other."""
    last = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    pairs = last.to(torch.int16).mul_(257).view(torch.uint8)  # the same byte in both halves of 16 bits
    return pairs.permute(0, 3, 1, 2) if x.dim() == 4 else pairs


def _halves(weight: Tensor) -> Tensor:
    """(O, I, ...) int8 to (O, 2 I, ...): two weights of at most `_HALF` beside each other, which add up to one."""
    half = weight >> 1
    return torch.stack([half, weight - half], 2).flatten(1, 2)


class Unfit(Exception):
    """Why a network cannot run in integers here."""


@dataclass(frozen=True)
class Packed:
    """A layer's weight in oneDNN's own layout."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor
    halved: bool
    """whether every channel of the input meets two halves of its weight"""

    @property
    def size(self) -> int:
        """In bytes, as good as."""
        return self.weight.numel()


class IntegerLayer:
    """One layer, called with the bytes of its input."""

    def __init__(
        self, layer: QuantizedLayer, affine: Affine, input_shape: torch.Size | None, padding: Sequence[int] = ()
    ) -> None:
        """`input_shape` is None for a layer whose output the logits do not need; `padding` replaces the layer's."""
        self.quantized = layer
        self.affine = affine
        self.input_shape = input_shape
        self.padding = padding or getattr(layer.layer, "padding", ())
        self.packed: Packed | None = None

    def pack(self, quantized: QuantizedWeight) -> Packed:
        """A weight, packed."""
        layer, shape = self.quantized.layer, self.input_shape
        quantized = quantized.with_whole_bias(self.affine)
        # oneDNN takes what lies in memory one after the other, whatever the strides are.
        integers, scale, bias = (each.contiguous() for each in (quantized.integers, quantized.scale, quantized.bias))
        zero = torch.zeros(len(scale), dtype=torch.int32)
        one_by_one = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels  # no products are added
        halved = bool(saturates() and not one_by_one and (integers.abs() > _HALF).any())
        if halved:
            integers = _halves(integers)
        if isinstance(layer, nn.Linear):
            weight = _ONEDNN.qlinear_prepack(integers, None)
        else:
            if halved and shape is not None:
                shape = torch.Size((shape[0], 2 * shape[1], *shape[2:]))
            weight = _ONEDNN.qconv_prepack(
                integers, scale, self.affine.scale, self.affine.zero_point,
                layer.stride, self.padding, layer.dilation, layer.groups, shape,
            )  # fmt: skip
        return Packed(weight, scale, zero, bias, halved)

    def __call__(self, x: Tensor, then: Affine | None, activation: str, limits: Sequence[float]) -> Tensor:
        """(N, ...) uint8 to float32, or to the bytes of `then`, after `activation`."""
        packed, layer = self.packed, self.quantized.layer
        assert packed is not None
        x = _twice(x) if packed.halved else x
        kind, scale, zero = (torch.uint8, then.scale, then.zero_point) if then else (torch.float32, 1.0, 0)
        if isinstance(layer, nn.Linear):
            return _ONEDNN.qlinear_pointwise(
                x, self.affine.scale, self.affine.zero_point, packed.weight, packed.scale, packed.zero, packed.bias,
                scale, zero, kind, activation, limits, "",
            )  # fmt: skip
        return _ONEDNN.qconv2d_pointwise(
            x, self.affine.scale, self.affine.zero_point, packed.weight, packed.scale, packed.zero, packed.bias,
            layer.stride, self.padding, layer.dilation, layer.groups, scale, zero, kind, activation, limits, "",
        )  # fmt: skip


class KeptWeights:
    """Packed weights, at most `memory` bytes of them beside those in use; what was used longest ago goes first."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._kept: OrderedDict[tuple[QuantizedLayer, Affine, LayerBits], Packed] = OrderedDict()
        self.size = 0
        """in bytes"""

    def recall(self, layer: IntegerLayer, bits: LayerBits) -> Packed:
        """The weight of `layer` at `bits`, packed now if it is not there."""
        key = (layer.quantized, layer.affine, bits)
        packed = self._kept.get(key)
        if packed is None:
            packed = self._kept[key] = layer.pack(layer.quantized.quantized(bits))
            self.size += packed.size
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and self.size > self._memory:
            self.size -= self._kept.popitem(last=False)[1].size
        return packed


class IntegerNetwork:
    """A quantized network whose layers run in integers, for allocations with these activation bits."""

    def __init__(
        self, network: QuantizedNetwork, program: Program, activations: Sequence[int], kept: KeptWeights
    ) -> None:
        """`kept` holds packed weights, of this network and of others."""
        modules = [layer.layer for layer in network.layers]
        program, paddings = with_padding_in_layers(network.multiplied(program), modules)
        shapes = program.input_shapes()
        self.layers = [
            IntegerLayer(layer, layer.covering(bits), shapes.get(index), paddings.get(index, ()))
            for index, (layer, bits) in enumerate(zip(network.layers, activations, strict=True))
        ]
        sums = network.carried(program.steps, program.logits)
        self.program, self.in_bytes = in_bytes(program, self.layers, [layer.affine for layer in self.layers], sums)
        self._kept = kept

    def choose(self, allocation: Allocation) -> None:
        """Gives every layer its bits; raises `Unfit` for bits that this CPU does not multiply exactly."""
        if not exact(allocation.most):
            raise Unfit(f"products of bytes and {allocation.most} bits overflow on this CPU, or PyTorch has none")
        for layer, bits in zip(self.layers, allocation.weights, strict=True):
            if layer.input_shape is not None:
                layer.packed = self._kept.recall(layer, bits)

    def take(self, weights: Sequence[QuantizedWeight]) -> None:
        """Gives every layer its weight."""
        for layer, weight in zip(self.layers, weights, strict=True):
            if layer.input_shape is not None:
                layer.packed = layer.pack(weight)

    @torch.inference_mode()
    def logits(self, pixels: Tensor | Images) -> Tensor:
        """(N, C, H, W) float32 to (N, classes)."""
        parts = pixels.split(self.program.batch)
        return torch.cat(
            [self.program.run(self.program.begin(self.program.padded(part)))[: len(part)] for part in parts]
        )
