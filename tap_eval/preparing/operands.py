"""Products of two activations, as attention's of queries with keys and of probabilities with values: their operands.

They are matrix products of what comes of the image, whoever calls them: `matmul`, `bmm`, `baddbmm`, `einsum` and the
like, and the two in `scaled_dot_product_attention`, which is taken apart for it. Each operand has a number, by the
order of a pass, and a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tap_eval.preparing.tracing import Call

Operand = Callable[[int, Tensor], Tensor]
"""what is multiplied in the place of an operand, by its number"""
ATTENTION = "scaled_dot_product_attention"
SIDES = ("left", "right")
_OPERANDS: dict[str, tuple[int, tuple[str, str]]] = {
    "matmul": (0, ("input", "other")),
    "__matmul__": (0, ("input", "other")),
    "__rmatmul__": (0, ("input", "other")),
    "mm": (0, ("input", "mat2")),
    "bmm": (0, ("input", "mat2")),
    "addmm": (1, ("mat1", "mat2")),
    "addbmm": (1, ("batch1", "batch2")),
    "baddbmm": (1, ("batch1", "batch2")),
    "einsum": (1, ("", "")),
}
"""the place of the first, and what both are called where they are given by name"""


def operands_of(call: Call, is_constant: Callable[[Any], bool]) -> tuple[Tensor, Tensor] | None:
    """Both operands of a matrix product of activations; None of any other call."""
    if call.name not in _OPERANDS:
        return None
    found = [args.get(place) for args, place in _places(call)]
    if len(found) != len(SIDES) or not all(isinstance(each, Tensor) for each in found):
        return None
    left, right = found
    plain = all(each.is_floating_point() and each.layout is torch.strided for each in found)
    return (left, right) if plain and not any(map(is_constant, found)) else None


def with_operands(call: Call, operands: Sequence[Tensor]) -> Call:
    """The same call of others."""
    args, kwargs = dict(enumerate(_spread(call))), dict(call.kwargs)
    for (held, place), operand in zip(_places(call), operands, strict=True):
        (kwargs if held is call.kwargs else args)[place] = operand
    return replace(call, args=tuple(args.values()), kwargs=kwargs, tensors=(*call.tensors, *operands))


def _places(call: Call) -> list[tuple[Any, Any]]:
    """Where each operand of a call lies: what holds it, and its place there."""
    first, names = _OPERANDS[call.name]
    args = dict(enumerate(_spread(call)))
    if call.name == "einsum" and len(args) != first + len(SIDES):
        return []
    return [(args, first + side) if first + side in args else (call.kwargs, names[side]) for side in range(len(SIDES))]


def _spread(call: Call) -> Sequence[Any]:
    """The arguments, without the list in which `einsum` may have its operands."""
    if call.name == "einsum" and len(call.args) == 2 and isinstance(call.args[1], list | tuple):
        return (call.args[0], *call.args[1])
    return call.args


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` gives in eval mode, by two matrix products and a softmax in float."""
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return torch.softmax(scores, -1) @ value
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
    else:
        scores = scores + attn_mask
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(nothing, 0.0) @ value
