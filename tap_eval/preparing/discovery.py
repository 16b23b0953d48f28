"""Which products a network is made of, and what reads their outputs, watched while it runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tap_eval.mistake import NetworkMistake
from tap_eval.preparing.layers import Use
from tap_eval.preparing.products import Product, Quantizable
from tap_eval.preparing.tracing import MOVEMENTS, PASSING, Call, Norm, Source, Tracing


@dataclass
class Met:
    """A product that was met, over all passes so far."""

    source: Source
    module: Quantizable
    """as the network holds it, nothing folded in"""
    images: int
    """of the first pass in which it ran, whose calls `uses` are"""
    uses: list[Use] = field(default_factory=list)
    often: bool = False
    """whether it ran more than once in a pass"""
    biases: set[str | None] = field(default_factory=set)
    """what it was called with; several where modules share a weight"""
    readers: set[str] = field(default_factory=set)
    """functions that read its output, apart from batch normalization of its channels"""
    norms: dict[str, Norm] = field(default_factory=dict)
    """batch normalizations of its channels, by name"""


@dataclass
class Found:
    """What passes of a network have shown."""

    products: dict[str, Met] = field(default_factory=dict)
    """by key, in the order in which they ran first"""
    readers: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """functions that read a tensor of the network in float32, by the tensor's name"""
    biases: set[str] = field(default_factory=set)
    """tensors that are biases of products"""
    norm_inputs: defaultdict[str, set[str | None]] = field(default_factory=lambda: defaultdict(set))
    """keys of the products that a batch normalization read, None for anything else, by its name"""
    norms_often: set[str] = field(default_factory=set)
    """batch normalizations that ran more than once in a pass"""
    originals: dict[int, tuple[Tensor, str]] = field(default_factory=dict)
    """tensors of the network before it was copied that were met all the same, by `id`"""

    outside: dict[int, tuple[Tensor, str]] = field(default_factory=dict)
    """tensors that code reads and no module of the network holds, by `id`, with a name for each"""
    kind: torch.dtype = torch.float32
    """of the layers' weights"""

    def foldable(self, key: str) -> Norm | None:
        """The batch normalization that can be folded into a product: each the other's only partner, in all passes."""
        met = self.products[key]
        if met.often or met.readers or len(met.norms) != 1:
            return None
        ((name, norm),) = met.norms.items()
        return norm if self.norm_inputs[name] == {key} and name not in self.norms_often else None


class Discovery(Tracing):
    """One pass, of which `found` is told everything; the network computes what it would compute."""

    def __init__(
        self,
        found: Found,
        images: int,
        named: Mapping[int, tuple[Tensor, str]],
        originals: Mapping[int, tuple[Tensor, str]],
    ) -> None:
        super().__init__({**named, **originals})
        self._found = found
        self._images = images
        self._originals = originals
        self._ran: Counter[str] = Counter()
        self._new: set[str] = set()
        self._outputs: dict[int, tuple[Tensor, str, Tensor | None]] = {}
        """outputs of products, moved or not: the tensor, the key, and the channel of each element"""

    def on_product(self, key: str, source: Source, product: Product, call: Call) -> Any:
        self._meet(call)
        self._read_output(call)
        self._read_weights(call, (product.weight, product.bias))
        result = call()
        before = product.before(product.x)
        if key not in self._found.products:
            if source.expression not in source.roots:  # computed anew in each pass, and maybe changed in this one
                product = replace(product, weight=product.weight.clone())
            self._found.products[key] = Met(source, product.module(self._found.kind), self._images)
            self._new.add(key)
        met = self._found.products[key]
        if key in self._new:
            met.uses.append(Use(product.x.shape, result.shape, product.positions))
        self._ran[key] += 1
        met.often |= self._ran[key] > 1
        of_bias = self.source(product.bias)
        met.biases.add(of_bias.expression if of_bias else None)
        self._found.biases |= of_bias.roots if of_bias else set()
        self._outputs[id(result)] = (result, key, _channels(product, met.module, before, result))
        return result

    def on_norm(self, norm: Norm, call: Call) -> Any:
        self._meet(call)
        if norm.training and norm.mean is not None:
            raise NetworkMistake(
                f"batch normalization {norm.name or 'without a name'} stays in training mode after network.eval(): "
                "hold its module in an attribute or in nn.ModuleList, and leave its mode to its network."
            )
        if norm.mean is None or norm.variance is None:
            raise NetworkMistake(
                f"batch normalization {norm.name or 'without a name'} has no running statistics and takes those of the "
                "images beside it, so that what an image gets depends on its batch: give a network that keeps them "
                "(track_running_stats=True)."
            )
        self._ran[f"norm {norm.name}"] += 1
        if self._ran[f"norm {norm.name}"] > 1:
            self._found.norms_often.add(norm.name)
        held = self._outputs.get(id(norm.x))
        if held and held[2] is not None and _is_second_axis(held[2]):
            self._found.norm_inputs[norm.name].add(held[1])
            self._found.products[held[1]].norms[norm.name] = norm
            self._read(call, but=norm.x)
        else:
            self._found.norm_inputs[norm.name].add(None)
            self._read(call)
        return call()

    def on_other(self, call: Call) -> Any:
        if any(isinstance(each, torch.ScriptObject) for each in call.args):
            raise NetworkMistake(
                f"{call.name} reads weights that are quantized and packed already: give the network as it was before "
                "it was quantized."
            )
        result = call()
        self._meet(call)
        held = self._outputs.get(id(call.read[0])) if call.read else None
        if held and result is held[0] and call.name in PASSING:
            return result
        if held and call.name in MOVEMENTS and call.args and call.args[0] is held[0] and isinstance(result, Tensor):
            moved = None if held[2] is None else call.func(held[2], *call.args[1:], **call.kwargs)
            self._outputs[id(result)] = (result, held[1], moved)
            return result
        self._read(call)
        return result

    def _meet(self, call: Call) -> None:
        for tensor in call.tensors:
            if id(tensor) in self._originals:
                self._found.originals[id(tensor)] = self._originals[id(tensor)]

    def _read_output(self, call: Call, but: Tensor | None = None) -> None:
        """Notes that the call reads outputs of products."""
        for tensor in call.read:
            if tensor is not but and id(tensor) in self._outputs:
                self._found.products[self._outputs[id(tensor)][1]].readers.add(call.name)

    def _read(self, call: Call, but: Tensor | None = None) -> None:
        """Notes that the call reads outputs of products, and tensors of the network in float32."""
        self._read_output(call, but)
        self._read_weights(call, ())

    def _read_weights(self, call: Call, but: Sequence[Tensor | None]) -> None:
        for tensor in call.read:
            if not any(tensor is other for other in but):
                for root in source.roots if (source := self.source(tensor)) else ():
                    self._found.readers[root].add(call.name)


def _channels(product: Product, module: Quantizable, before: Tensor, result: Tensor) -> Tensor | None:
    """The output channel of each element of a product's result, int32; None where it is not plain."""
    channels = torch.arange(len(module.weight), dtype=torch.int32)
    if not product.geometry:
        found = product.after(channels.expand(*before.shape[:-1], -1))
    elif result.dim() == product.weight.dim():
        found = channels.view(-1, *[1] * (result.dim() - 2)).expand(result.shape)
    else:
        return None
    if found.shape != result.shape or found.dtype != torch.int32:
        return None
    return torch.empty_like(result, dtype=torch.int32).copy_(found)  # with the strides of the result, for `view`


def _is_second_axis(channels: Tensor) -> bool:
    """Whether the channel of each element is its place on the second axis."""
    if channels.dim() < 2:
        return False
    expected = torch.arange(channels.shape[1], dtype=torch.int32).view(-1, *[1] * (channels.dim() - 2))
    return bool((channels == expected).all())
