"""Arithmetic on the bytes of activations: each operation gives the bytes nearest to what the bytes that it reads mean.

Where PyTorch has its quantized tensors (their makers say that they are about to go), and these
add as is right, a tensor of bytes lends them its memory: they add and pool many bytes at a time.
Otherwise bytes become float32 and bytes again, for the same numbers at several times the time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tap_eval.quantization.quantizer import Affine

_MAGIC = 1.5 * 2**23
"""a float32 of this size has its whole number in the low bits, rounded half to even"""
_AT_ONCE = 64
"""channels that PyTorch pools together in quantized tensors, and those that are left over one by one"""
_ANY = Affine(1.0, 0, 8)
_OFF = 0.5 + 1e-3
"""from the number that it stands for, in parts of a byte, a byte that is nearest is less"""


def bytes_of(x: Tensor, affine: Affine) -> Tensor:
    """`x` float32 as integers of `affine`, uint8, with channels last."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    if affine.bits == 8 and _lends():
        x = x.contiguous(memory_format=layout)
        return _taken(torch.quantize_per_tensor(x, affine.scale, affine.zero_point, torch.quint8))
    real = torch.mul(x, 1 / affine.scale, out=torch.empty_like(x, memory_format=layout))
    least = _MAGIC - affine.zero_point
    whole = real.add_(_MAGIC).clamp_(least, least + 2**affine.bits - 1)
    if affine.zero_point:
        whole.add_(affine.zero_point)
    return whole.view(torch.int32).to(torch.uint8)  # the low byte; from float it takes five times as long


def floats_of(x: Tensor, affine: Affine) -> Tensor:
    """What bytes stand for, float32."""
    if _lends():
        return _lent(x, affine).dequantize()
    return x.to(torch.float32).sub_(affine.zero_point).mul_(affine.scale)


def converted(x: Tensor, of: Affine, to: Affine) -> Tensor:
    """Bytes of one range as those of another."""
    return x if of == to else bytes_of(floats_of(x, of), to)


def added(x: Tensor, other: Tensor, of: Affine, of_other: Affine, to: Affine) -> Tensor:
    """The sum of two, in bytes of `to`."""
    if _lends():
        return _taken(torch.ops.quantized.add(_lent(x, of), _lent(other, of_other), to.scale, to.zero_point))
    return bytes_of(floats_of(x, of) + floats_of(other, of_other), to)


def joined(parts: Sequence[Tensor], dim: int = 0, *, of: Sequence[Affine], to: Affine) -> Tensor:
    """Concatenated along `dim`, in bytes of `to`."""
    return torch.cat([converted(part, each, to) for part, each in zip(parts, of, strict=True)], dim)


def averaged(x: Tensor, *args: Any, function: Callable[..., Tensor], of: Affine, to: Affine) -> Tensor:
    """What `function`, which takes means of some numbers, gives of what bytes stand for, in bytes of `to`."""
    means = function(x.to(torch.float32).sub_(of.zero_point), *args)
    return bytes_of(means.mul_(of.scale), to)


def largest(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> Tensor:
    """Maximum pooling in two dimensions: of bytes of one range the largest stands for the largest number."""
    if _lends() and (ceil or x.shape[1] % _AT_ONCE == 0):
        return _taken(torch.max_pool2d(_lent(x, _ANY), kernel, stride, padding, dilation, ceil))
    if ceil:
        return torch.max_pool2d(x.to(torch.float32), kernel, stride, padding, dilation, ceil).to(torch.uint8)
    (down, right), (rows, columns) = _pair(padding), _pair(kernel)
    x = padded(x, [right, right, down, down]) if down or right else x
    steps, gaps = _pair(stride or kernel), _pair(dilation)
    return _slid(_slid(x, 2, rows, steps[0], gaps[0]), 3, columns, steps[1], gaps[1])


def _slid(x: Tensor, dim: int, count: int, step: int, gap: int) -> Tensor:
    """The largest of `count` bytes along a dimension, `gap` apart, from every `step` on."""
    length = (x.shape[dim] - gap * (count - 1) - 1) // step + 1
    parts = [x.narrow(dim, gap * place, x.shape[dim] - gap * place) for place in range(count)]
    every = (slice(None),) * dim
    found, *others = [part[(*every, slice(0, step * (length - 1) + 1, step))] for part in parts]
    for other in others:
        found = torch.maximum(found, other)
    return found


def _pair(given: Any) -> tuple[int, int]:
    """One number, or one or two of them in a list, for both dimensions."""
    first, *rest = [given] if isinstance(given, int) else given
    return first, rest[0] if rest else first


def padded(x: Tensor, widths: Sequence[int], zero: float = 0) -> Tensor:
    """With `zero` at the edges, `widths` of them from the last dimension on, before it and after it; channels last."""
    if min(widths) < 0:
        return torch.constant_pad_nd(x, list(widths), zero)
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    sizes = [*x.shape]
    for place, pair in enumerate(pairs, 1):
        sizes[-place] += sum(pair)
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    found = inner = torch.empty(sizes, dtype=x.dtype, memory_format=layout)
    for place, (before, after) in enumerate(pairs, 1):
        inner.narrow(-place, 0, before).fill_(zero)
        inner.narrow(-place, inner.shape[-place] - after, after).fill_(zero)
        inner = inner.narrow(-place, before, x.shape[-place])
    inner.copy_(x)
    return found


def _lent(x: Tensor, affine: Affine) -> Tensor:
    """A quantized tensor in the memory of bytes."""
    found = torch._empty_affine_quantized([0], scale=affine.scale, zero_point=affine.zero_point, dtype=torch.quint8)
    return found.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def _taken(x: Tensor) -> Tensor:
    """The bytes of a quantized tensor, in its memory."""
    found = torch.empty(0, dtype=torch.uint8)
    return found.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


@cache
def _lends() -> bool:
    """Whether there are quantized tensors here that take and give the memory of bytes, and add to the nearest byte."""
    every = torch.arange(256, dtype=torch.uint8)
    of, of_other, to = Affine(0.0371, 117, 8), Affine(0.0213, 3, 8), Affine(0.0427, 60, 8)
    x, other = (each.contiguous() for each in torch.meshgrid(every, every, indexing="ij"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they are deprecated
            lent, lent_other = _lent(x, of), _lent(other, of_other)
            got = _taken(torch.ops.quantized.add(lent, lent_other, to.scale, to.zero_point))
            real = lent.dequantize().double()
            again = _taken(torch.quantize_per_tensor(lent.dequantize(), of.scale, of.zero_point, torch.quint8))
            most = _taken(torch.max_pool2d(lent[None, None], [2, 2]))
    except (RuntimeError, AttributeError, TypeError):
        return False
    expected = (x.double() - of.zero_point) * of.scale
    total = expected + (other.double() - of_other.zero_point) * of_other.scale
    off = got.double() - (total / to.scale + to.zero_point).clamp(0, 255)
    nearest = bool((off.abs() < _OFF).all()) and torch.allclose(real, expected, rtol=1e-6, atol=1e-6 * of.scale)
    return nearest and torch.equal(again, x) and torch.equal(most[0, 0], x[1::2, 1::2])
