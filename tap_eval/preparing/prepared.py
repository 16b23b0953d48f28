"""A network made ready for quantizing: itself, the layers that its products are, and what stays in float."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tap_eval.device import CPU, out_of_memory
from tap_eval.images.images import Images
from tap_eval.mistake import NetworkMistake
from tap_eval.preparing.copying import copy_of
from tap_eval.preparing.layers import Layer
from tap_eval.preparing.operands import ATTENTION, SIDES, Operand, attended, operands_of, with_operands
from tap_eval.preparing.outputs import Output
from tap_eval.preparing.products import Product, Quantizable
from tap_eval.preparing.tracing import MOVEMENTS, PASSING, Call, Norm, Source, Tracing, named_tensors

_BATCH_BYTES, _LEAST_BATCH, _MOST_BATCH = 2**22, 4, 64
_Result = TypeVar("_Result")


@dataclass
class Room:
    """So many images have fitted into memory together, as far as has been tried."""

    images: int = _MOST_BATCH


@dataclass(frozen=True)
class Rest:
    """A tensor of the network that no layer holds: it stays in float32."""

    name: str
    reason: str
    """the functions that read it, "" where none does"""
    count: int
    """elements"""

    @property
    def used(self) -> bool:
        """Whether inference needs it."""
        return bool(self.reason)


@dataclass(frozen=True)
class Prepared:
    """A network, which runs as it is but for its layers, in the order in which they run."""

    network: nn.Module
    layers: tuple[Layer, ...]
    modules: tuple[Quantizable, ...]
    """a plain module for each layer, batch normalization folded in"""
    places: Mapping[str, int]
    """index of the layer that a product is, by the product's key"""
    folded: Mapping[int, str]
    """name of the batch normalization that is folded into a layer, by the layer's index"""
    shared: frozenset[str]
    """keys of products that are called with several biases, which are added afterwards"""
    rest: tuple[Rest, ...]
    output: Output
    watched: tuple[Tensor, ...] = ()
    """the images on which the layers were found"""
    originals: tuple[tuple[Tensor, str], ...] = ()
    """tensors of the network before it was copied, which a closure of it still reads"""
    notes: tuple[str, ...] = ()
    repeated: int = 0
    """elements that the layers' weights, and `rest`, have more than the network: of one that is read in several ways"""
    room: Room = field(default_factory=Room)
    operands: tuple[str, ...] = ()
    """names of the operands of products of two activations that are to be in integers, in the order of a pass"""

    @property
    def device(self) -> torch.device:
        """Where it runs; images are brought there batch by batch."""
        return self.modules[0].weight.device

    def on(self, device: torch.device) -> Prepared:
        """A copy on another device; the tensors that no module of the network holds follow when they are read."""
        modules = tuple(_on(device, module) for module in self.modules)
        return replace(self, network=copy_of(self.network, device), modules=modules, room=Room())

    @property
    def batch(self) -> int:
        """Images a batch that run fast: on the CPU so many that the largest activation stays near a core."""
        if self.device != CPU:
            return self.room.images
        largest = max(layer.in_channels * layer.input_size**2 * layer.tokens for layer in self.layers)
        return min(max(_BATCH_BYTES // (4 * largest), _LEAST_BATCH), self.room.images)

    def reaching(self, images: Images | Tensor, at_once: int) -> list[tuple[Images | Tensor, int]]:
        """`images`, so many at once, and for layers that they miss, whole, those on which the layers were found."""
        return [(images, at_once), *((batch, len(batch)) for batch in self.watched)]

    def check_reached(self, layers: Collection[int]) -> None:
        """Raises `RuntimeError` unless `layers` has the index of each, as not in a process without its globals."""
        if silent := [layer.name for layer in self.layers if layer.index not in layers]:
            raise RuntimeError(f"{', '.join(silent)} ran when the network was prepared, and not in this process")

    def fitting(self, compute: Callable[[], _Result]) -> _Result:
        """`compute()`, from its start again with half of `batch` as long as memory is too small for it."""
        while True:
            try:
                return compute()
            except RuntimeError as error:
                if not out_of_memory(error) or self.batch == 1:
                    raise
                self.room.images = self.batch // 2

    @property
    def left(self) -> int:
        """Elements that stay in float32 when the network runs, the biases that layers hold aside."""
        return sum(rest.count for rest in self.rest if rest.used)

    def in_float(self) -> dict[str, Tensor]:
        """What stays in float32 when the network runs, by name, the biases that layers hold aside."""
        parts = (self.network.named_parameters, self.network.named_buffers)
        tensors = {name: tensor for named in parts for name, tensor in named(remove_duplicate=False)}
        tensors |= {name: tensor for tensor, name in (*named_tensors(self.network).values(), *self.originals)}
        return {rest.name: tensors[rest.name].detach() for rest in self.rest if rest.used}

    @property
    def share_left(self) -> float:
        """Of the elements that the network needs, those that stay in float32, in [0, 1]."""
        return self.left / (self.left + sum(layer.params for layer in self.layers))

    def module(self, layer: Layer) -> Quantizable:
        """The `Conv2d` or `Linear` that `layer` describes."""
        return self.modules[layer.index]

    def __call__(
        self,
        pixels: Tensor,
        layers: Sequence[Callable[[Tensor], Tensor]] | None = None,
        operands: Operand | None = None,
    ) -> Tensor:
        """(N, C, H, W) float32 on any device to logits (N, classes) on its own, with `layers` in the modules' places.

        With `operands`, products of two activations are of what it gives for each operand. Raises `NetworkMistake` when
        an image leads to a product that no image led to before.
        """
        named = named_tensors(self.network) | {id(tensor): (tensor, name) for tensor, name in self.originals}
        with _Running(self, self.modules if layers is None else layers, named, operands):
            return self.output.logits(self.network(pixels.to(self.device)))


def _on(device: torch.device, module: Quantizable) -> Quantizable:
    made = copy.copy(module)
    tensors = module._parameters.items()
    made._parameters = {
        name: None if each is None else nn.Parameter(each.detach().to(device), requires_grad=False)
        for name, each in tensors
    }
    return made


class _Running(Tracing):
    """Leads each product to its layer, and passes by the batch normalization that is folded into it."""

    def __init__(
        self,
        prepared: Prepared,
        layers: Sequence[Callable[[Tensor], Tensor]],
        named: Mapping[int, tuple[Tensor, str]],
        operands: Operand | None,
    ) -> None:
        super().__init__(named)
        self._prepared = prepared
        self._layers = layers
        self._operands = operands
        self._met = 0
        """operands so far"""
        self._norms = frozenset(prepared.folded.values())
        self._awaited: dict[int, tuple[Tensor, int]] = {}
        """outputs that their batch normalization has not read yet, with the layer's index"""

    def on_product(self, key: str, source: Source, product: Product, call: Call) -> Any:
        self._check_awaited(call)
        index = self._prepared.places.get(key)
        if index is None:
            raise NetworkMistake(
                f"an image reaches the weights of {', '.join(sorted(source.roots))}, which none of those reached that "
                "the network was prepared with, or not by these numbers: give more calibration images, or a network "
                "that makes no weights of an image's numbers in Python."
            )
        if key in self._prepared.shared:
            product = product.without_bias()
        y = self._layers[index](product.before(product.x).to(self._prepared.modules[index].weight))
        result = product.after(y.to(product.x.dtype))
        if index in self._prepared.folded:
            self._awaited[id(result)] = (result, index)
        return result

    def on_norm(self, norm: Norm, call: Call) -> Any:
        held = self._awaited.pop(id(norm.x), None)
        if held and self._prepared.folded[held[1]] == norm.name:
            return norm.x
        if held or norm.name in self._norms:
            raise _other_way(norm.name)
        return call()

    def on_other(self, call: Call) -> Any:
        if self._operands is not None:
            if call.name == ATTENTION:
                self._check_awaited(call)
                with self:
                    return attended(*call.args, **call.kwargs)
            if operands := operands_of(call, lambda tensor: self.source(tensor) is not None):
                self._check_awaited(call)
                given = [self._operands(self._met + side, operand) for side, operand in enumerate(operands)]
                self._met += len(SIDES)
                return with_operands(call, given)()
        result = call()
        held = [self._awaited[id(tensor)] for tensor in call.read if id(tensor) in self._awaited]
        if not held or (result is held[0][0] and call.name in PASSING):
            return result
        if call.name not in MOVEMENTS:
            raise _other_way(self._prepared.layers[held[0][1]].name)
        self._awaited[id(result)] = (result, held[0][1])
        return result

    def _check_awaited(self, call: Call) -> None:
        for tensor in call.tensors:
            if id(tensor) in self._awaited:
                raise _other_way(self._prepared.layers[self._awaited[id(tensor)][1]].name)


def attending(prepared: Prepared) -> Prepared:
    """The same network with its `operands` named, each after the layer that runs before it.

    They have to be the same for all images, each with a range of its own; where they are not, a note says so.
    """
    passes: list[tuple[str, ...]] = []
    for batch in prepared.watched:
        names: list[str] = []
        products = Counter[str]()
        before = ["input"]

        def noting(
            name: str, module: Callable[[Tensor], Tensor], before: list[str] = before
        ) -> Callable[[Tensor], Tensor]:
            def call(x: Tensor) -> Tensor:
                before.append(name)
                return module(x)

            return call

        def operand(
            number: int,
            x: Tensor,
            names: list[str] = names,
            products: Counter[str] = products,
            before: list[str] = before,
        ) -> Tensor:
            side, last = SIDES[number % len(SIDES)], before[-1]
            products[last] += side == SIDES[0]
            again = products[last] - 1
            names.append(f"{last}.product{f':{again}' if again else ''}.{side}")
            return x

        pairs = zip(prepared.layers, prepared.modules, strict=True)
        prepared(batch, [noting(layer.name, module) for layer, module in pairs], operand)
        passes.append(tuple(names))
    if len(set(passes)) > 1:
        note = (
            "products of two activations stay in float32, in place of --attention-activations 8: they are others for "
            "other images, or another number of them"
        )
        return replace(prepared, notes=(*prepared.notes, note))
    return replace(prepared, operands=passes[0])


def _other_way(name: str) -> NetworkMistake:
    return NetworkMistake(
        f"an image goes another way round {name} than those that the network was prepared with, so that its batch "
        "normalization cannot be folded: give more calibration images."
    )
