"""What the header of a packed file tells: the structure of the network, as JSON."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


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
    """the layer whose input has its scale and zero point, None where it has its own"""
    range: tuple[float, float] | None = None
    """which its 8 bits cover, where that layer's input has fewer bits and so another scale"""


class Header(Record):
    format: int
    layers: tuple[LayerRecord, ...]
    between: tuple[BetweenRecord, ...] | None = None
    """None where values between layers are in float32"""
    in_float: dict[str, str]
    """what reads a tensor that stays in float32, by the tensor's name"""
    about: dict[str, Any]
