"""What a file tells of the network in it beside its tensors: its structure, as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import nn

from tap_eval.export.between import Between
from tap_eval.preparing.layers import Layer
from tap_eval.preparing.products import Quantizable
from tap_eval.quantization.quantizer import Allocation, LayerBits, QuantizedNetwork, distinct

FORMAT = 1
"""raised when files of before could not be read any more"""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class LayerRecord(Record):
    """A layer's structure, that of a plain convolution or linear layer."""

    name: str
    kind: str
    module: Literal["Conv2d", "Linear"]
    shape: tuple[PositiveInt, ...] = Field(min_length=2)
    """of the weight"""
    bits: tuple[Annotated[int, Field(ge=2, le=8)], ...] = Field(min_length=1)
    """that its channels have, each once"""
    activation_bits: int = Field(ge=2, le=8)
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    folded: str | None = None
    """the batch normalization that is folded in"""

    @property
    def row(self) -> int:
        """Weights an output channel."""
        return math.prod(self.shape[1:])


class BetweenRecord(Record):
    """A value that is rounded to 8 bits as soon as it is computed: see `tap_eval.export.between.Between`."""

    name: str
    operation: str
    of: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    input_of: str | None = None
    """the layer whose input has its range, None where it has its own"""
    range: tuple[float, float] | None = None
    """which its 8 bits cover, where that layer's input has fewer bits and so another scale"""
    input_range: tuple[float, float] | None = None
    """which the fewer bits of that input cover, where it is another, as it may be under a rule that looks at bits"""

    @property
    def has_own_integers(self) -> bool:
        """Whether scale and zero point are not those of a layer's input."""
        return self.input_of is None or self.range is not None


class Header(Record):
    format: int
    layers: tuple[LayerRecord, ...]
    between: tuple[BetweenRecord, ...] | None = None
    """None where values between layers are in float32"""
    operands: tuple[str, ...] = ()
    """of products of two activations that are in integers, see `tap_eval.preparing.prepared.attending`"""
    in_float: dict[str, str]
    """what reads a tensor that stays in float32, by the tensor's name"""
    about: dict[str, Any]


def header_of(
    network: QuantizedNetwork, allocation: Allocation, values: Sequence[Between] | None, about: Mapping[str, Any]
) -> Header:
    """Of a network that has the bits of `allocation`; `values` are what travels between its layers in integers."""
    prepared = network.prepared
    return Header(
        format=FORMAT,
        layers=tuple(
            _structure(layer, module, bits, activation, prepared.folded.get(layer.index))
            for layer, module, bits, activation in zip(
                prepared.layers, prepared.modules, allocation.weights, allocation.activations, strict=True
            )
        ),
        between=None if values is None else tuple(told_between(value, network) for value in values),
        operands=prepared.operands,
        in_float={rest.name: rest.reason for rest in prepared.rest if rest.used},
        about=dict(about),
    )


def _structure(layer: Layer, module: Quantizable, bits: LayerBits, activation: int, folded: str | None) -> LayerRecord:
    own: dict[str, Any] = {}
    if isinstance(module, nn.Conv2d):
        own = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
    return LayerRecord(
        name=layer.name,
        kind=layer.kind,
        module="Conv2d" if own else "Linear",
        shape=tuple(module.weight.shape),
        bits=tuple(sorted(distinct(bits))),
        activation_bits=activation,
        folded=folded,
        **own,
    )


def told_between(value: Between, network: QuantizedNetwork) -> BetweenRecord:
    """Of a value between the layers of a network."""
    layer = None if value.layer is None else network.layers[value.layer]
    eight = own = None
    if layer is not None and layer.affine is not None and layer.affine != value.affine:
        eight, own = (_with_zero(*layer.seen.range_at(bits)) for bits in (8, layer.affine.bits))
    return BetweenRecord(
        name=value.name,
        operation=value.operation,
        of=value.of,
        then=value.then,
        input_of=None if value.layer is None else network.prepared.layers[value.layer].name,
        range=eight,
        input_range=None if own == eight else own,
    )


def _with_zero(low: float, high: float) -> tuple[float, float]:
    """A range widened to hold zero, as integers cover it."""
    return min(low, 0.0), max(high, 0.0)
