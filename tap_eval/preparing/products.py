"""The functions that multiply activations with weights, each as a call of a plain `Conv2d` or `Linear`.

However a network is written, its products are calls of a few functions. Each is described here
as a layer's: what comes before (padding, an axis more, zeros between pixels), the product of a
plain module, and what comes after. The description is exact, not an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Quantizable = nn.Conv2d | nn.Linear
Change = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    """`x` itself."""
    return x


def multiply(layer: Quantizable, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `layer` computes of `x` with this weight and bias."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, bias)
    return F.linear(x, weight, bias)


@dataclass(frozen=True)
class Product:
    """`after(module(before(x)))`, with `module` of this geometry and `plain(weight)` as its weight (O, ...)."""

    x: Tensor
    weight: Tensor
    """as the function was given it"""
    bias: Tensor | None
    geometry: tuple[Any, ...]
    """stride, padding, dilation and groups of a convolution; () of a linear layer"""
    plain: Change = same
    before: Change = same
    after: Change = same
    positions: int = 0
    """rows, or pixels of all images, each of which takes every weight once"""

    def without_bias(self) -> Product:
        """The same with the bias added after the product."""
        if self.bias is None:
            return self
        shaped = self.bias.view(-1, *[1] * (self.weight.dim() - 2)) if self.geometry else self.bias
        return replace(self, bias=None, after=_chain([self.after, partial(torch.add, shaped)]))

    def module(self, kind: torch.dtype = torch.float32) -> Quantizable:
        """In eval mode, with weights of `kind`; it shares its weight with the network where that is used as it is."""
        weight = self.plain(self.weight.detach()).to(kind)
        if self.geometry:
            stride, padding, dilation, groups = self.geometry
            rows, columns = weight.shape[2:]
            kernel, channels = (rows, columns), weight.shape[1] * groups
            made: Any = nn.Conv2d(channels, len(weight), kernel, stride, padding, dilation, groups, device="meta")
        else:
            made = nn.Linear(weight.shape[1], len(weight), device="meta")
        made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        made.bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(kind), requires_grad=False)
        return made.eval()


Weights = Callable[[Any], bool]
"""whether a tensor is a weight, or computed from weights alone"""


def product_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], is_weight: Weights) -> Product | None:
    """The product that the function called `name` computes of activations and a weight, if it is one of ours."""
    read = _READERS.get(name)
    if read is None or any(isinstance(value, Tensor) and value.is_nested for value in args):
        return None
    try:
        product = read(is_weight, *args, **kwargs)
    except TypeError:  # arguments that only another overload takes
        return None
    if product is None or is_weight(product.x) or not (_is_plain(product.x) and _is_plain(product.weight)):
        return None
    return product


def _is_plain(tensor: Tensor) -> bool:
    """Whether it holds real numbers, as it seems: not complex, sparse, or a part of one that `vmap` takes apart."""
    return (
        tensor.is_floating_point()
        and tensor.layout is torch.strided
        and not torch._C._functorch.is_batchedtensor(tensor)
    )


def _linear(is_weight: Weights, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product | None:
    if not is_weight(weight) or weight.dim() != 2:
        return None
    return _constant_bias(Product(input, weight, bias, (), positions=_rows(input), **_row(input)), is_weight)


def _matmul(is_weight: Weights, input: Tensor, other: Tensor) -> Product | None:
    if is_weight(other) and other.dim() == 2:
        return Product(input, other, None, (), plain=Tensor.t, positions=_rows(input), **_row(input))
    if is_weight(input) and input.dim() == 2 and other.dim() == 1:
        return Product(other, input, None, (), positions=1, **_row(other))
    if is_weight(input) and input.dim() == 2:
        return Product(
            other, input, None, (), before=_turned, after=_turned, positions=other.numel() // other.shape[-2]
        )
    return None


def _addmm(is_weight: Weights, input: Tensor, mat1: Tensor, mat2: Tensor, **scaling: float) -> Product | None:
    product = _matmul(is_weight, mat1, mat2)
    if product is None or product.after is not same or any(value != 1 for value in scaling.values()):
        return None
    return _constant_bias(replace(product, bias=input), is_weight)


def _bilinear(
    is_weight: Weights, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Product | None:
    """x1' W x2 of each output is a linear function of the products of all pairs of x1 and x2."""
    if not is_weight(weight) or is_weight(input1) or is_weight(input2):
        return None
    pairs = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
    plain = partial(torch.flatten, start_dim=1)
    return _constant_bias(
        Product(pairs, weight, bias, (), plain=plain, positions=_rows(pairs), **_row(pairs)), is_weight
    )


def _einsum(is_weight: Weights, equation: str, *operands: Any) -> Product | None:
    """`...k,ko->...o` in any order of axes, with any number of contracted and of new axes."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) != 2 or equation.count(",") != 1:
        return None
    names, out = _spelled(equation, operands)
    place = 1 if is_weight(operands[1]) else 0
    x, weight, of_x, of_weight = operands[1 - place], operands[place], names[1 - place], names[place]
    inner = [label for label in of_weight if label in of_x]
    new = [label for label in of_weight if label not in of_x]
    kept = [label for label in of_x if label not in inner]
    single = len(set(of_x)) == len(of_x) and len(set(of_weight)) == len(of_weight) and new and inner and kept
    if not single or sorted(out) != sorted([*kept, *new]) or not is_weight(weight):
        return None
    sizes = [weight.shape[of_weight.index(label)] for label in new]
    of_columns = [of_x.index(label) for label in kept + inner]
    of_rows = [of_weight.index(label) for label in new + inner]
    of_out = [(kept + new).index(label) for label in out]
    return Product(
        x, weight, None, (),
        plain=lambda weight: weight.permute(of_rows).flatten(len(new)).flatten(0, len(new) - 1),
        before=lambda x: x.permute(of_columns).flatten(len(kept)),
        after=lambda y: y.unflatten(-1, sizes).permute(of_out),
        positions=math.prod(x.shape[of_x.index(label)] for label in kept),
    )  # fmt: skip


def _spelled(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str]:
    """The axes of each operand and of the output, with a letter in the place of each that is not written."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow:
        letters = inputs.replace(",", "").replace(".", "")
        out = "..." * ("." in inputs) + "".join(sorted(each for each in letters if letters.count(each) == 1))
    names, rest = inputs.split(","), ""
    for index, operand in enumerate(operands):
        missing = operand.dim() - len(names[index].replace("...", ""))
        letters = "".join(chr(ord("\u03b1") + axis) for axis in range(missing))[::-1]  # counted from the last
        names[index], rest = names[index].replace("...", letters), max(rest, letters, key=len)
    return names, out.replace("...", rest)


def _conv(
    is_weight: Weights, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1, *, axes: int = 2,
) -> Product | None:  # fmt: skip
    if not is_weight(weight):
        return None
    sizes = weight.shape[2:]
    stride, dilation = _each(stride, axes), _each(dilation, axes)
    before: list[Change] = []
    if isinstance(padding, str):
        total = [d * (size - 1) if padding == "same" else 0 for d, size in zip(dilation, sizes, strict=True)]
        padding = tuple(amount // 2 for amount in total)
        if any(amount % 2 for amount in total):  # as torch does it: the odd one at the end
            before.append(partial(F.pad, pad=[n for amount in reversed(total) for n in (0, amount % 2)]))
    padding = _each(padding, axes)
    pixels = [
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, p, d, kernel, s in zip(
            _chain(before)(input).shape[-axes:], padding, dilation, sizes, stride, strict=True
        )
    ]
    return _convolution(input, weight, bias, (stride, padding, dilation, groups), same, before, pixels, is_weight)


def _conv1d(is_weight: Weights, *args: Any, **kwargs: Any) -> Product | None:
    return _conv(is_weight, *args, **kwargs, axes=1)


def _transposed(
    is_weight: Weights, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1, *, axes: int = 2,
) -> Product | None:  # fmt: skip
    """A convolution of the input with zeros between its pixels, by the flipped weight."""
    if not is_weight(weight):
        return None
    stride, padding, dilation = _each(stride, axes), _each(padding, axes), _each(dilation, axes)
    more = _each(output_padding, axes)
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    pads = [n for r, o in zip(reversed(reach), reversed(more), strict=True) for n in (r, r + o)]
    before: list[Change] = [partial(_spread, stride=stride), partial(F.pad, pad=pads)]
    geometry = ((1,) * axes, (0,) * axes, dilation, groups)
    plain = partial(_flipped, groups=groups)
    return _convolution(input, weight, bias, geometry, plain, before, input.shape[-axes:], is_weight)


def _transposed1d(is_weight: Weights, *args: Any, **kwargs: Any) -> Product | None:
    return _transposed(is_weight, *args, **kwargs, axes=1)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], plain: Change, before: list[Change],
    pixels: Sequence[int], is_weight: Weights,
) -> Product:  # fmt: skip
    """With an axis more for what has one axis, or no batch."""
    after: list[Change] = []
    unbatched = x.dim() == weight.dim() - 1
    if unbatched:
        before, after = [partial(torch.unsqueeze, dim=0), *before], [partial(torch.squeeze, dim=0)]
    if weight.dim() == 3:
        stride, padding, dilation, groups = geometry
        geometry, row = ((1, *stride), (0, *padding), (1, *dilation), groups), partial(torch.unsqueeze, dim=2)
        before, plain, after = [*before, row], _chain([plain, row]), [partial(torch.squeeze, dim=2), *after]
    positions = math.prod(pixels) * (1 if unbatched else len(x))
    product = Product(x, weight, bias, geometry, plain, _chain(before), _chain(after), positions)
    return _constant_bias(product, is_weight)


def _aten_convolution(
    is_weight: Weights, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, *_: bool,
) -> Product | None:  # fmt: skip
    axes = weight.dim() - 2
    if axes > 2:
        return None
    if transposed:
        return _transposed(is_weight, input, weight, bias, stride, padding, output_padding, groups, dilation, axes=axes)
    return _conv(is_weight, input, weight, bias, stride, padding, dilation, groups, axes=axes)


_READERS: dict[str, Callable[..., Product | None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": lambda is_weight, input, mat2: _matmul(is_weight, input, mat2),
    "mv": lambda is_weight, input, vec: _matmul(is_weight, input, vec),
    "__matmul__": _matmul,
    "__rmatmul__": lambda is_weight, input, other: _matmul(is_weight, other, input),
    "addmm": _addmm,
    "bilinear": _bilinear,
    "einsum": _einsum,
    "conv1d": _conv1d,
    "conv2d": _conv,
    "conv_transpose1d": _transposed1d,
    "conv_transpose2d": _transposed,
    "convolution": _aten_convolution,
    "_convolution": _aten_convolution,
}


def _constant_bias(product: Product, is_weight: Weights) -> Product:
    """A bias that depends on the image, or is no number for each output, is added after the product."""
    if product.bias is None:
        return product
    plain = is_weight(product.bias) and (
        bool(product.geometry) or product.bias.shape == product.plain(product.weight).shape[:1]
    )
    return product if plain else product.without_bias()


def _row(x: Tensor) -> dict[str, Change]:
    """What makes a row of one vector, and a vector of one row."""
    return {"before": partial(torch.unsqueeze, dim=0), "after": partial(torch.squeeze, dim=0)} if x.dim() == 1 else {}


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _each(value: Any, axes: int) -> tuple[int, ...]:
    found = (value,) if isinstance(value, int) else tuple(value)
    return found * axes if len(found) == 1 else found


def _chain(changes: Sequence[Change]) -> Change:
    """One after the other."""
    return (lambda x: reduce(lambda value, change: change(value), changes, x)) if changes else same


def _turned(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Zeros between the pixels: (..., H, W) to (..., (H - 1) * s + 1, (W - 1) * s + 1)."""
    if all(step == 1 for step in stride):
        return x
    axes = len(stride)
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[-axes:], stride, strict=True)]
    wide = x.new_zeros((*x.shape[:-axes], *sizes))
    places: list[Any] = [slice(None, None, step) for step in stride]
    wide[(..., *places)] = x
    return wide


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """(I, O / groups, ...) of a transposed convolution to (O, I / groups, ...), flipped."""
    cut = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return cut.flip(tuple(range(2, cut.dim())))
