"""What is in a file of a quantized network, or in an allocation, whatever its format, for `tap-agent inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tap_eval.allocation.size import INPUT
from tap_eval.quantization.quantizer import Affine


@dataclass(frozen=True)
class LayerDescription:
    """A quantized layer. None where the file does not tell."""

    name: str
    """in the user's network"""
    kind: str
    """conv, depthwise, linear or attention, as far as it is known"""
    shape: tuple[int, ...]
    """of its weight, output channels first"""
    bits: Mapping[int, int]
    """how many output channels have their weights at each number of bits"""
    stored: str
    """as what the weights are in the file"""
    size: int | None
    """bytes of its weights, scales, bias and input together"""
    scales: tuple[float, float] | None
    """the least and the greatest of its output channels"""
    activation_bits: int
    inputs: tuple[float, float] | None
    """the least and the greatest real number that its input may be"""


@dataclass(frozen=True)
class BetweenDescription:
    """A value between layers that is rounded to 8 bits as soon as it is computed."""

    name: str
    made: str
    """of what and how it is made, in words"""
    size: int
    """bytes of its scale and zero point; none where it has those of a layer's input"""
    reach: tuple[float, float]
    """the least and the greatest real number that it may be"""


@dataclass(frozen=True)
class Description:
    """A file, or an allocation of one network."""

    form: str
    """what it is, in words"""
    layers: tuple[LayerDescription, ...]
    in_float: Mapping[str, int]
    """bytes of what stays in float, by name"""
    about: Mapping[str, str]
    """what the file says of itself"""
    overhead: int | None = None
    """bytes that hold no values: names, shapes, steps of a graph; None for what is no file of a network"""
    between: tuple[BetweenDescription, ...] = ()
    """in the order in which they are computed"""

    @property
    def size(self) -> int | None:
        """Bytes of all values, None where a layer's are not told."""
        sizes = [layer.size for layer in self.layers]
        if None in sizes:
            return None
        return sum(filter(None, sizes)) + sum(each.size for each in self.between) + sum(self.in_float.values())


def described_operand(name: str, affine: Affine) -> BetweenDescription:
    """An operand of a product of two activations."""
    return BetweenDescription(name, "operand of a product of two activations", INPUT, affine.range)


def made(operation: str, of: Sequence[str], then: Sequence[str]) -> str:
    """How a value between layers is made, in words."""
    return ", then ".join((f"{operation} of {', '.join(of)}" if of else operation, *then))
