"""What an allocation takes: bytes of the packed network, part by part, bits of weights, and bit operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from tap_eval.preparing.layers import Layer
from tap_eval.preparing.prepared import Prepared
from tap_eval.quantization.quantizer import Allocation, LayerBits, distinct
from tap_eval.quantization.sums import NONE, Ranged

FLOAT = 4
"""bytes of a float32"""
INPUT = FLOAT + 1
"""bytes for what is read in integers, of a layer its input: the scale, and the zero point as a byte"""


class Weighted(Protocol):
    """What a size needs of a layer."""

    @property
    def params(self) -> int:
        """Weight elements, without the bias."""

    @property
    def out_channels(self) -> int:
        """Rows that the weight is packed in."""


@dataclass(frozen=True)
class Size:
    """Bytes of a network's values, part by part. Names, shapes and bits a layer are no part of it: a file's header."""

    weights: int
    """packed at their bits, each output channel's row aligned to a byte; in full precision, float32"""
    scales: int
    """float32, one an output channel"""
    biases: int
    """float32, one an output channel: the correction for what rounding shifts gives every quantized layer one"""
    inputs: int
    """scale and zero point of each layer's input, and of what is rounded between layers unless it has those of an
    input: a float32 and a byte"""
    channel_bits: int
    """a byte an output channel, its bits, in layers whose channels differ in bits; the order follows from it"""
    rest: int
    """what stays in float32 because no layer holds it"""

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def packed_size(layers: Sequence[Weighted], allocation: Allocation, rest: int, sums: Ranged = NONE) -> Size:
    """The packed network's, `rest` bytes of which stay in float32, with `sums` between layers."""
    pairs = list(zip(layers, allocation.weights, strict=True))
    channels = sum(layer.out_channels for layer in layers)
    return Size(
        weights=sum(row_bytes(layer, bits) for layer, bits in pairs),
        scales=FLOAT * channels,
        biases=FLOAT * channels,
        inputs=INPUT * (len(layers) + sums.scales(allocation.activations)),
        channel_bits=sum(layer.out_channels for layer, bits in pairs if is_mixed(bits)),
        rest=rest,
    )


def full_size(prepared: Prepared) -> Size:
    """Of all that inference needs in full precision: each weight once, and the biases that layers have."""
    biases = [module.bias.numel() for module in prepared.modules if module.bias is not None]
    weights = sum(layer.params for layer in prepared.layers) - prepared.repeated
    return Size(FLOAT * weights, 0, FLOAT * sum(biases), 0, 0, FLOAT * prepared.left)


def fixed_bytes(layers: Sequence[Weighted], rest: int) -> int:
    """What the packed network takes whatever its bits are: all but the weights and the bits of channels."""
    return rest + sum(2 * FLOAT * layer.out_channels + INPUT for layer in layers)


def row_bytes(layer: Weighted, bits: LayerBits) -> int:
    """Bytes of a layer's weights, or of as many of its output channels as `bits` names, each row aligned to a byte."""
    row = layer.params // layer.out_channels
    if isinstance(bits, int):
        return layer.out_channels * -(-row * bits // 8)
    return sum(bits.count(each) * -(-row * each // 8) for each in set(bits))


def is_mixed(bits: LayerBits) -> bool:
    """Whether the output channels of a layer differ in bits."""
    return len(distinct(bits)) > 1


def weight_size(layers: Sequence[Weighted], allocation: Allocation) -> int:
    """Size of the weights in bits, nothing aligned: what a budget of average bits or of per cent is about."""
    return sum(over_channels(layer.params, layer, bits) for layer, bits in zip(layers, allocation.weights, strict=True))


def bops(layers: Sequence[Layer], allocation: Allocation) -> int:
    """Bit operations an image: the sum over layers of macs * weight bits * activation bits."""
    pairs = zip(allocation.weights, allocation.activations, strict=True)
    return sum(
        over_channels(layer.macs, layer, weight) * activation
        for layer, (weight, activation) in zip(layers, pairs, strict=True)
    )


def over_channels(amount: int, layer: Weighted, bits: LayerBits) -> int:
    """Sum of bits over `amount` of a layer's weights or macs, of which each output channel has its equal share."""
    return amount * bits if isinstance(bits, int) else amount // layer.out_channels * sum(bits)
