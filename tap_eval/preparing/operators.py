"""TorchScript's operators as Python functions: those of products and norms as the modules of `torch.nn` call them."""

from __future__ import annotations

import functools
import math
import operator as python
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tap_eval.mistake import NetworkMistake

_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32),
    torch.bfloat16,
)
"""by TorchScript's number of them"""


@functools.cache
def operator_of(name: str) -> Callable[..., Any]:
    """The function of an operator by its name and overload, as "aten::add.Tensor"; it takes arguments by position.

    Raises `NetworkMistake` for an operator that has none, or that takes objects of C++ (packed, quantized weights).
    """
    base, _, overload = name.partition(".")
    if base in _VALUES:
        return _VALUES[base]
    namespace, _, short = base.partition("::")
    if namespace == "prim":  # called from Python, some of these end the process
        raise unreadable(name)
    try:
        operation: Any = getattr(getattr(getattr(torch.ops, namespace), short), overload or "default")
        arguments = operation._schema.arguments
    except (AttributeError, RuntimeError):
        raise unreadable(name) from None
    if any("__torch__" in str(argument.type) for argument in arguments):
        raise unreadable(name)
    on_tensor = bool(arguments) and str(arguments[0].type) in ("Tensor", "Optional[Tensor]")
    if short in _PLAIN and not on_tensor:
        return _PLAIN[short]
    function = _CALLS.get(short, operation) if namespace == "aten" else operation
    positional = sum(not argument.kwarg_only for argument in arguments)
    keywords = [argument.name for argument in arguments[positional:]]
    return lambda *values: function(*values[:positional], **dict(zip(keywords, values[positional:], strict=False)))


def unreadable(name: str) -> NetworkMistake:
    """Says that `name` stands in the way of reading a TorchScript network."""
    return NetworkMistake(
        f"{name} in a TorchScript network cannot be read: give the Python network that it was made from, as "
        "package.module:factory."
    )


def dtype_of(number: int | torch.dtype | None) -> torch.dtype | None:
    """The dtype that TorchScript writes as `number`."""
    return _DTYPES[number] if isinstance(number, int) else number


_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    *_: bool,
) -> Tensor:
    dimensions = weight.dim() - 3
    if transposed:
        return _TRANSPOSED[dimensions](x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _CONVOLUTIONS[dimensions](x, weight, bias, stride, padding, dilation, groups)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What nn.MultiheadAttention computes in one kernel, (N, L, width) each, in its products. A mask is for tokens
    by tokens (type 0), of padded tokens (1), or for each image and head (2), and true or -inf where not to look."""
    if not (query is key is value) or query.is_nested:
        raise unreadable("aten::_native_multi_head_attention of several or nested tensors")
    images, length, _ = query.shape
    q, k, v = (
        part.reshape(images, length, heads, -1).transpose(1, 2)
        for part in F.linear(query, qkv_weight, qkv_bias).chunk(3, dim=-1)
    )
    looks = None if mask is None else ~mask.to(torch.bool)
    if looks is not None and mask_type == 1:
        looks = looks[:, None, None, :]
    weights = None
    if need_weights:
        scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(-2, -1))
        scores = scores if looks is None else scores.masked_fill(~looks, -math.inf)
        weights = F.softmax(scores, dim=-1)
        attended = torch.matmul(weights, v)
        weights = weights.mean(dim=1) if average else weights
    else:
        attended = F.scaled_dot_product_attention(q, k, v, looks)
    return F.linear(attended.transpose(1, 2).reshape(images, length, width), out_weight, out_bias), weights


def _encoder_layer(
    x: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    *rest: Any,
) -> Tensor:
    """What nn.TransformerEncoderLayer computes in one kernel, in its products."""
    norm1, norm1_bias, norm2, norm2_bias, up, up_bias, down, down_bias, mask, mask_type = (*rest, None, None)[:10]
    activation = F.gelu if use_gelu else F.relu

    def attend(y: Tensor) -> Tensor:
        weights = (qkv_weight, qkv_bias, out_weight, out_bias)
        return _attention(y, y, y, width, heads, *weights, mask, False, False, mask_type)[0]

    def widen(y: Tensor) -> Tensor:
        return F.linear(activation(F.linear(y, up, up_bias)), down, down_bias)

    def first(y: Tensor) -> Tensor:
        return F.layer_norm(y, (width,), norm1, norm1_bias, eps)

    def second(y: Tensor) -> Tensor:
        return F.layer_norm(y, (width,), norm2, norm2_bias, eps)

    if norm_first:
        x = x + attend(first(x))
        return x + widen(second(x))
    x = first(x + attend(x))
    return second(x + widen(x))


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *args: function(x, *args, inplace=True)


_WITH_IN_PLACE: tuple[Any, ...] = (
    *(F.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.silu, F.mish, F.selu, F.celu, F.leaky_relu, F.dropout),
    F.threshold,
)

_CALLS: dict[str, Callable[..., Any]] = {
    **{function.__name__.removeprefix("_"): function for function in _WITH_IN_PLACE},
    **{function.__name__.removeprefix("_") + "_": _in_place(function) for function in _WITH_IN_PLACE},
    **{function.__name__: function for function in (*_CONVOLUTIONS, *_TRANSPOSED)},
    **{
        name: getattr(torch, name)
        for name in ("matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "cat", "sigmoid", "tanh", "lstm", "gru")
    },
    "_convolution": _convolution,
    "convolution": _convolution,
    "_convolution_mode": lambda x, w, *args: _CONVOLUTIONS[w.dim() - 3](x, w, *args),
    "linear": F.linear,
    "bilinear": F.bilinear,
    "einsum": lambda equation, tensors, path=None: torch.einsum(equation, *tensors),
    "embedding": lambda weight, i, padding=-1, scale=False, sparse=False: F.embedding(i, weight, sparse=sparse),
    "batch_norm": lambda x, w, b, mean, var, training, momentum, eps, *_: F.batch_norm(
        x, mean, var, w, b, training, momentum, eps
    ),
    "instance_norm": lambda x, w, b, mean, var, use_input, momentum, eps, *_: F.instance_norm(
        x, mean, var, w, b, use_input, momentum, eps
    ),
    "layer_norm": lambda x, shape, w=None, b=None, eps=1e-5, *_: F.layer_norm(x, shape, w, b, eps),
    "group_norm": lambda x, groups, w=None, b=None, eps=1e-5, *_: F.group_norm(x, groups, w, b, eps),
    "gelu": F.gelu,
    "softmax": lambda x, dim, dtype=None: F.softmax(x, dim, dtype=dtype_of(dtype)),
    "log_softmax": lambda x, dim, dtype=None: F.log_softmax(x, dim, dtype=dtype_of(dtype)),
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "max_pool2d": F.max_pool2d,
    "avg_pool2d": F.avg_pool2d,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "_native_multi_head_attention": _attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
"""aten operators on tensors by the function that Python code calls for them"""


def _raise(message: str, *_: str) -> None:
    raise RuntimeError(message)


def _set_item(container: Any, key: Any, value: Any) -> None:
    container[key] = value


_VALUES: dict[str, Callable[..., Any]] = {
    "prim::ListConstruct": lambda *items: list(items),
    "prim::TupleConstruct": lambda *items: items,
    "prim::DictConstruct": lambda *items: dict(zip(items[::2], items[1::2], strict=True)),
    "prim::TupleIndex": python.getitem,
    "prim::NumToTensor": lambda number: torch.scalar_tensor(
        number, dtype=torch.float64 if isinstance(number, float) else torch.int64
    ),
    "prim::RaiseException": _raise,
    "prim::unchecked_cast": lambda value: value,
    "prim::unchecked_unwrap_optional": lambda value: value,
    "prim::Uninitialized": lambda: None,
    "prim::Print": lambda *_: None,
    "prim::device": lambda x: x.device,
    "prim::dtype": lambda x: _DTYPES.index(x.dtype),
    "prim::type": lambda device: device.type,
    "prim::shape": lambda x: list(x.shape),
    "prim::is_cuda": lambda x: x.is_cuda,
    "prim::is_nested": lambda x: x.is_nested,
    "prim::requires_grad": lambda x: x.requires_grad,
    "prim::max": max,
    "prim::min": min,
    "aten::Int": int,
    "aten::Float": float,
    "aten::Bool": bool,
    **dict.fromkeys(["aten::IntImplicit", "aten::FloatImplicit", "aten::ScalarImplicit"], lambda x: x.item()),
    "aten::tensor": lambda data, dtype=None, device=None, requires_grad=False: torch.tensor(
        data, dtype=dtype_of(dtype), device=device, requires_grad=requires_grad
    ),
    "aten::warn": lambda message, level=2: warnings.warn(message, stacklevel=level),
    "aten::is_autocast_enabled": torch.is_autocast_enabled,
    "aten::is_grad_enabled": torch.is_grad_enabled,
}
"""operators on values and containers, those that Python has no schema of or that need its own types"""

_PLAIN: dict[str, Callable[..., Any]] = {
    **{name: getattr(python, name) for name in ("add", "sub", "mul", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge")},
    **{name: getattr(python, name) for name in ("__and__", "__or__", "__xor__", "__not__", "__contains__")},
    **{name: getattr(math, name) for name in ("ceil", "floor", "sqrt", "exp", "log")},
    "add_": python.iadd,
    "div": python.truediv,
    "floordiv": python.floordiv,
    "remainder": python.mod,
    "__is__": python.is_,
    "__isnot__": python.is_not,
    "__getitem__": python.getitem,
    "_set_item": _set_item,
    "Delete": python.delitem,
    "__range_length": lambda low, high, step: len(range(low, high, step)),
    "__derive_index": lambda index, low, step: low + index * step,
    **{name: lambda items, *args, name=name: getattr(items, name)(*args) for name in ("append", "extend", "insert")},
    **{
        name: lambda items, *args, name=name: getattr(items, name)(*args) for name in ("pop", "clear", "reverse", "get")
    },
    **{name: lambda items, name=name: list(getattr(items, name)()) for name in ("keys", "values", "items")},
    **dict.fromkeys(["list", "copy"], list),
    "dict": dict,
    "sort": lambda items, reverse=False: items.sort(reverse=reverse),
    "sorted": sorted,
    "slice": lambda items, start=None, stop=None, step=1: items[start:stop:step],
    "len": len,
    "str": str,
    "format": str.format,
    **{"any": any, "all": all},
}
"""aten operators whose first argument is no tensor, which Python has too; containers are changed in place"""
