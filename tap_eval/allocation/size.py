"""What an allocation takes: bits of weights, and bit operations."""

from __future__ import annotations

from collections.abc import Sequence

from tap_eval.preparing.layers import Layer
from tap_eval.quantization.quantizer import Allocation, LayerBits


def weight_size(layers: Sequence[Layer], allocation: Allocation) -> int:
    """Size of the weights in bits."""
    return sum(over_channels(layer.params, layer, bits) for layer, bits in zip(layers, allocation.weights, strict=True))


def bops(layers: Sequence[Layer], allocation: Allocation) -> int:
    """Bit operations an image: the sum over layers of macs * weight bits * activation bits."""
    pairs = zip(allocation.weights, allocation.activations, strict=True)
    return sum(
        over_channels(layer.macs, layer, weight) * activation
        for layer, (weight, activation) in zip(layers, pairs, strict=True)
    )


def over_channels(amount: int, layer: Layer, bits: LayerBits) -> int:
    """Sum of bits over `amount` of a layer's weights or macs, of which each output channel has its equal share."""
    return amount * bits if isinstance(bits, int) else amount // layer.out_channels * sum(bits)
