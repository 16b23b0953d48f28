"""Integers of few bits, packed into bytes: the layout of weights in every file that is written."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def packed(integers: Tensor, bits: int) -> Tensor:
    """Rows (R, ...) int8 of symmetric integers at `bits` as (R, bytes) uint8, each row aligned to a byte.

    An integer `q` is stored as the unsigned number `q + 2^(bits - 1)`. Numbers follow each other
    without a gap, the first in the lowest bits of the first byte; a row ends in zeros.
    """
    rows = integers.flatten(1).to(torch.int16) + 2 ** (bits - 1)
    each = np.unpackbits(rows.to(torch.uint8).numpy()[..., None], axis=-1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(each.reshape(len(rows), -1), axis=1, bitorder="little"))


def unpacked(rows: Tensor, bits: int, count: int) -> Tensor:
    """The integers (R, count) int8 of rows that `packed` gave."""
    each = np.unpackbits(rows.numpy(), axis=1, count=count * bits, bitorder="little").reshape(len(rows), count, bits)
    numbers = np.packbits(each, axis=2, bitorder="little")[..., 0]
    return torch.from_numpy(numbers.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
