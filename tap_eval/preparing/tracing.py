"""What a network does with its weights, seen function by function while it runs.

A network is run as it is; a mode of PyTorch's sees every function that its code calls. It
follows which tensors are weights, or are computed from weights alone, so a product is
recognised by its weight, wherever the call stands: in a module, a closure, a plain list, a
functional call. Subclasses decide what becomes of products and of batch normalization.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from tap_eval.device import CPU
from tap_eval.preparing.products import Product, product_of, same

MOVEMENTS = {
    "flatten", "view", "reshape", "transpose", "permute", "squeeze", "unsqueeze", "contiguous", "unflatten", "movedim",
    "moveaxis", "swapaxes", "swapdims", "reshape_as", "view_as",
}  # fmt: skip
"""functions that only move values"""
PASSING = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout",
    "to", "float", "type_as", "requires_grad_",
}  # fmt: skip
"""functions that may return their argument itself, untouched"""
SHAPED = {"reshape_as", "view_as", "expand_as", "type_as"}
"""functions that take a shape or a type from the tensors after the first"""
METADATA = {
    "shape", "size", "dim", "ndim", "dtype", "device", "layout", "numel", "nelement", "stride", "is_contiguous",
    "is_floating_point", "is_cuda", "is_cpu", "requires_grad", "__len__", "element_size", "is_complex", "grad_fn",
    "is_quantized", "is_mkldnn", "is_meta", "is_nested", "is_sparse", "storage_offset", "is_inference", "data_ptr",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_empty", "new_full", "new_tensor",
}  # fmt: skip
"""what is asked of a tensor without reading its values"""
_DRAWN = {
    "rand", "randn", "randint", "randperm", "random", "normal", "uniform", "exponential", "cauchy", "geometric",
    "bernoulli", "multinomial", "poisson", "empty",
}  # fmt: skip
"""functions that give something else each time, up to the first "_" of their names"""
_HALF = (torch.float16, torch.bfloat16)
_IN_PLACE = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__"})
_LONGEST = 200  # characters of an expression, before it is named by its hash


@dataclass(frozen=True)
class Source:
    """Where a weight comes from: an expression that is the same in every pass, and the tensors in it by name."""

    expression: str
    roots: frozenset[str]
    """empty for what is made of no tensor"""


@dataclass(frozen=True)
class Call:
    """A call of a function of PyTorch's."""

    name: str
    """without its overload; of an attribute, the attribute's"""
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    """among the arguments, at any depth"""

    @staticmethod
    def of(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Call:
        """The call of `func` with these arguments."""
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = func.__self__.__name__
        name = name.partition(".")[0]
        if isinstance(func, OpOverload | OpOverloadPacket) and (room := str(func).partition(".")[0]) != "aten":
            name = f"{room}.{name}"  # which may be that of another function in PyTorch
        return Call(name, func, args, kwargs, tuple(_tensors(args) + _tensors(kwargs.values())))

    @property
    def in_place(self) -> bool:
        """Whether it writes to one of its arguments."""
        named_so = self.name.endswith("_") and not self.name.endswith("__")
        schema = getattr(self.func, "_schema", None)
        named_so = named_so or (schema is not None and schema.is_mutable)
        return named_so or self.name in _IN_PLACE or "out" in self.kwargs or self.kwargs.get("inplace") is True

    @property
    def read(self) -> tuple[Tensor, ...]:
        """The tensors whose values it reads."""
        return () if self.name in METADATA else self.tensors[:1] if self.name in SHAPED else self.tensors

    @property
    def written(self) -> tuple[Tensor, ...]:
        """The tensors that it writes to, if it is `in_place`."""
        return tuple(_tensors([self.kwargs["out"]])) if "out" in self.kwargs else self.tensors[:1]

    def __call__(self) -> Any:
        """What the function gives; of tensors on the CPU beside others on a device, copies are there in their place.

        Such tensors are held by no module, or made in the network's code without naming a device.
        """
        args, kwargs = self.args, self.kwargs
        devices = {tensor.device for tensor in self.tensors}
        if len(devices) == 2 and CPU in devices and not (self.in_place and any(each.is_cpu for each in self.written)):
            (device,) = devices - {CPU}
            args, kwargs = tree_map_only(Tensor, lambda each: each.to(device), (args, dict(kwargs)))
        return self.func(*args, **kwargs)


@dataclass(frozen=True)
class Norm:
    """A call of batch normalization, by the name of the module that holds its statistics."""

    name: str
    x: Tensor
    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    eps: float


def named_tensors(network: nn.Module) -> dict[int, tuple[Tensor, str]]:
    """Parameters, buffers and other tensors that modules hold, by their `id`, each with its first name."""
    found: dict[int, tuple[Tensor, str]] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        kept = {**module._parameters, **module._buffers}
        kept |= {name: value for name, value in vars(module).items() if isinstance(value, Tensor | list | tuple | dict)}
        for name, value in kept.items():
            for place, tensor in tensors_at(f"{path}.{name}" if path else name, value, 2):
                found.setdefault(id(tensor), (tensor, place))
    return found


def tensors_at(place: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors in `value`, which is called `place`, in so many containers in each other, each with its name."""
    if isinstance(value, Tensor):
        yield place, value
    elif depth and isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from tensors_at(f"{place}.{index}", each, depth - 1)
    elif depth and isinstance(value, dict) and not place.endswith(("_parameters", "_buffers", "_modules")):
        for key, each in value.items():
            yield from tensors_at(f"{place}.{key}", each, depth - 1)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among `values`, at any depth of lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _memory(tensor: Tensor) -> int:
    """Names the memory that a tensor shares with its views."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse ones, and those that stand for others, have none of their own
        return id(tensor)


def module_of(root: str) -> str:
    """The module, or what stands for one, whose weight a tensor called `root` is."""
    module, parametrized, _ = root.partition(".parametrizations.")
    if parametrized:
        return module
    parent, _, name = root.rpartition(".")
    if name.startswith(("weight", "bias", "running_")):
        return parent
    own = name.removesuffix("_weight").removesuffix("_bias")
    return f"{parent}.{own}" if parent else own


class Watching(TorchFunctionMode):
    """Sees each call of a function of PyTorch's, in functions that are compiled too."""

    def __init__(self) -> None:
        super().__init__()
        self._stances: list[ExitStack] = []

    def __enter__(self) -> Any:
        stance = ExitStack()
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stance.enter_context(torch.compiler.set_stance("force_eager"))
        stance.callback(torch.set_autocast_enabled, "cpu", torch.is_autocast_enabled("cpu"))
        self._stances.append(stance)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stances.pop().close()


class Tracing(Watching):
    """One pass of a network. Whatever comes out in half precision goes on in float32."""

    def __init__(self, named: Mapping[int, tuple[Tensor, str]]) -> None:
        super().__init__()
        self._known = {key: (tensor, Source(name, frozenset({name}))) for key, (tensor, name) in named.items()}
        self._memory = {_memory(tensor) for tensor, _ in named.values()}
        """where weights lie, and what is computed from weights alone"""
        self._written: dict[int, str | None] = {}
        """of this memory, what was written to: with what, None if not with weights alone"""
        self.met_half = False
        """whether anything was to be in half precision"""

    def source(self, value: Any) -> Source | None:
        """Where a tensor comes from, if from weights alone."""
        held = self._known.get(id(value))
        if held is None or not self._written or (place := _memory(value)) not in self._written:
            return held[1] if held else None
        written = self._written[place]
        return replace(held[1], expression=f"{held[1].expression} after {written}") if written else None

    def is_weight(self, value: Any) -> bool:
        """Whether `value` is a weight, or computed from weights alone."""
        source = self.source(value)
        return source is not None and bool(source.roots)

    def on_product(self, key: str, source: Source, product: Product, call: Call) -> Any:
        """What a product of activations with a weight gives; `key` names it, the same in every pass."""
        raise NotImplementedError

    def on_norm(self, norm: Norm, call: Call) -> Any:
        """What batch normalization of activations gives."""
        raise NotImplementedError

    def on_other(self, call: Call) -> Any:
        """What any other function of activations gives."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **(kwargs or {}))
        if torch.is_autocast_enabled("cpu"):  # as leaving its context sets back
            torch.set_autocast_enabled("cpu", False)
            self.met_half = True
        call = Call.of(func, args, kwargs or {})
        product = product_of(call.name, call.args, call.kwargs, self.is_weight)
        if product is not None and not product.x.numel():  # of no image
            result = call()
        elif product is not None:
            source = self.source(product.weight)
            assert source is not None
            turned = "" if product.plain is same else f"{call.name} "
            result = self.on_product(f"{turned}{source.expression} {product.geometry}", source, product, call)
        elif norm := self._norm(call):
            result = self.on_norm(norm, call)
        else:
            result = self._of_weights(call) if self._is_constant(call) else self._of_activations(call)
        if isinstance(result, Tensor) and result.dtype in _HALF:
            self.met_half = True
            known, result = self.source(result), result.float()
            if known:
                self._known[id(result)] = (result, known)
                self._memory.add(_memory(result))
        return result

    def _norm(self, call: Call) -> Norm | None:
        if call.name != "batch_norm":
            return None
        if call.func is F.batch_norm:
            names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
        else:
            names = ["input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"]
        given: dict[str, Any] = {"weight": None, "bias": None, "training": False, "eps": 1e-5}
        given |= dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
        if self.is_weight(given["input"]):
            return None
        sources = [self.source(given[each]) for each in ("running_mean", "weight")]
        roots = [root for source in sources if source for root in sorted(source.roots)]
        return Norm(
            module_of(roots[0]) if roots else "",
            given["input"], given["running_mean"], given["running_var"], given["weight"], given["bias"],
            bool(given["training"]), given["eps"],
        )  # fmt: skip

    def _is_constant(self, call: Call) -> bool:
        return all(map(self.source, call.tensors)) and call.name.partition("_")[0] not in _DRAWN

    def _of_weights(self, call: Call) -> Any:
        """What is computed of weights alone comes from them."""
        sources = [source for tensor in call.tensors if (source := self.source(tensor))]
        words = f"{call.name}({self._words(call.args)}, {self._words(call.kwargs)})"
        expression = words if len(words) < _LONGEST else hashlib.sha256(words.encode()).hexdigest()
        roots = frozenset[str]().union(*(source.roots for source in sources))
        result = call()
        for place, tensor in tensors_at("", result, 1):
            if id(tensor) not in self._known:
                self._known[id(tensor)] = (tensor, Source(expression + place, roots))
                self._memory.add(_memory(tensor))
        self._write(call, hashlib.sha256(words.encode()).hexdigest())
        return result

    def _of_activations(self, call: Call) -> Any:
        result = self.on_other(call)
        self._write(call, None)
        return result

    def _write(self, call: Call, words: str | None) -> None:
        """Notes what a call writes to: all weights that lie there have another value from now on."""
        if call.in_place and call.tensors and call.name not in PASSING:
            self._written.update((place, words) for place in map(_memory, call.written) if place in self._memory)

    def _words(self, value: Any) -> str:
        if isinstance(value, Tensor):
            source = self.source(value)
            assert source is not None
            return source.expression
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._words, value))}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {self._words(each)}' for key, each in value.items())}}}"
        plain = value is None or isinstance(value, int | float | complex | str | slice | torch.dtype | np.generic)
        return repr(value) if plain else type(value).__name__


_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""the same function, which shows its products to a mode instead of itself"""
