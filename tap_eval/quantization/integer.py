"""The fast path on CPUs: quantized layers multiplied in 8-bit integers by oneDNN.

A network's program is rewritten for it. Activations travel between layers as bytes where
nothing else reads them, ReLU and ReLU6 are done by the layer before them, and whatever else
the network computes stays in float32. It computes what the simulated path computes, up to the
order of additions in float32. The operators are those that PyTorch's own quantization for x86
uses, on plain tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, fx, nn

from tap_eval.images.images import Images
from tap_eval.preparing.program import Program, Step, Value, free
from tap_eval.quantization.quantizer import (
    Affine,
    Allocation,
    LayerBits,
    QuantizedLayer,
    QuantizedNetwork,
    QuantizedWeight,
)

_ONEDNN = torch.ops.onednn
_ATEN = torch.ops.aten
_EIGHT = 8
_MAGIC = 1.5 * 2**23
"""a float32 of this size has its whole number in the low bits, rounded half to even"""


@cache
def exact(bits: int = _EIGHT) -> bool:
    """Whether this CPU multiplies bytes by weights of `bits` without saturating.

    Those without VNNI add pairs of products in 16 bits, which hold two of 255 * 63, of 7 bits, and not of 8.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    top = 2 ** (bits - 1) - 1
    x, weight = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((8, 64), top, dtype=torch.int8)
    scale, zero = torch.ones(8), torch.zeros(8, dtype=torch.int32)
    try:
        packed = _ONEDNN.qlinear_prepack(weight, None)
        y = _ONEDNN.qlinear_pointwise(x, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
    except (RuntimeError, AttributeError):  # a build of PyTorch without these operators
        return False
    return bool((y == 64 * 255 * top).all())


def bytes_of(x: Tensor, affine: Affine) -> Tensor:
    """`x` float32 as integers of `affine`, uint8, with channels last."""
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    real = x.mul(1 / affine.scale)
    if affine.zero_point:
        real.add_(affine.zero_point)
    whole = real.add_(_MAGIC).clamp_(_MAGIC, _MAGIC + 2**affine.bits - 1)
    return whole.view(torch.int32).to(torch.uint8)  # the low byte; from float it takes five times as long


class Unfit(Exception):
    """Why a network cannot run in integers here."""


@dataclass(frozen=True)
class Packed:
    """A layer's weight in oneDNN's own layout."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor

    @property
    def size(self) -> int:
        """In bytes, as good as."""
        return self.weight.numel()


class IntegerLayer:
    """One layer, called with the bytes of its input."""

    def __init__(self, layer: QuantizedLayer, affine: Affine, input_shape: torch.Size | None) -> None:
        """`input_shape` is None for a layer whose output the logits do not need."""
        self.quantized = layer
        self.affine = affine
        self.input_shape = input_shape
        self.packed: Packed | None = None

    def pack(self, quantized: QuantizedWeight) -> Packed:
        """A weight, packed."""
        layer = self.quantized.layer
        zero = torch.zeros(len(quantized.scale), dtype=torch.int32)
        if isinstance(layer, nn.Linear):
            weight = _ONEDNN.qlinear_prepack(quantized.integers, None)
        else:
            weight = _ONEDNN.qconv_prepack(
                quantized.integers, quantized.scale, self.affine.scale, self.affine.zero_point,
                layer.stride, layer.padding, layer.dilation, layer.groups, self.input_shape,
            )  # fmt: skip
        return Packed(weight, quantized.scale, zero, quantized.bias)

    def __call__(self, x: Tensor, then: Affine | None, activation: str, limits: Sequence[float]) -> Tensor:
        """(N, ...) uint8 to float32, or to the bytes of `then`, after `activation`."""
        packed, layer = self.packed, self.quantized.layer
        assert packed is not None
        kind, scale, zero = (torch.uint8, then.scale, then.zero_point) if then else (torch.float32, 1.0, 0)
        if isinstance(layer, nn.Linear):
            return _ONEDNN.qlinear_pointwise(
                x, self.affine.scale, self.affine.zero_point, packed.weight, packed.scale, packed.zero, packed.bias,
                scale, zero, kind, activation, limits, "",
            )  # fmt: skip
        return _ONEDNN.qconv2d_pointwise(
            x, self.affine.scale, self.affine.zero_point, packed.weight, packed.scale, packed.zero, packed.bias,
            layer.stride, layer.padding, layer.dilation, layer.groups, scale, zero, kind, activation, limits, "",
        )  # fmt: skip


class KeptWeights:
    """Packed weights, at most `memory` bytes of them beside those in use; what was used longest ago goes first."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._kept: OrderedDict[tuple[QuantizedLayer, Affine, LayerBits], Packed] = OrderedDict()

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(packed.size for packed in self._kept.values())

    def recall(self, layer: IntegerLayer, bits: LayerBits) -> Packed:
        """The weight of `layer` at `bits`, packed now if it is not there."""
        key = (layer.quantized, layer.affine, bits)
        packed = self._kept.pop(key, None) or layer.pack(layer.quantized.quantized(bits))
        self._kept[key] = packed
        while len(self._kept) > 1 and self.size > self._memory:
            self._kept.popitem(last=False)
        return packed


class IntegerNetwork:
    """A quantized network whose layers run in integers, for allocations with these activation bits."""

    def __init__(
        self, network: QuantizedNetwork, program: Program, activations: Sequence[int], kept: KeptWeights
    ) -> None:
        """`kept` holds packed weights, of this network and of others."""
        shapes = program.input_shapes()
        self.layers = [
            IntegerLayer(layer, layer.covering(bits), shapes.get(index))
            for index, (layer, bits) in enumerate(zip(network.layers, activations, strict=True))
        ]
        self.program, self.in_bytes = _rewritten(program, self.layers)
        self._kept = kept

    def choose(self, allocation: Allocation) -> None:
        """Gives every layer its bits; raises `Unfit` for bits that this CPU does not multiply exactly."""
        if not exact(allocation.most):
            raise Unfit(f"this CPU adds products of {allocation.most} bits and bytes in 16 bits, which overflow")
        for layer, bits in zip(self.layers, allocation.weights, strict=True):
            if layer.input_shape is not None:
                layer.packed = self._kept.recall(layer, bits)

    def take(self, weights: Sequence[QuantizedWeight]) -> None:
        """Gives every layer its weight."""
        for layer, weight in zip(self.layers, weights, strict=True):
            if layer.input_shape is not None:
                layer.packed = layer.pack(weight)

    @torch.inference_mode()
    def logits(self, pixels: Tensor | Images) -> Tensor:
        """(N, C, H, W) float32 to (N, classes)."""
        parts = pixels.split(self.program.batch)
        return torch.cat(
            [self.program.run(self.program.begin(self.program.padded(part)))[: len(part)] for part in parts]
        )


Bytes = dict[Value, tuple[Value, Affine]]
"""Of values that are bytes, the value that they stand for, and as which integers; it may bear the same name."""


def _rewritten(program: Program, layers: Sequence[IntegerLayer]) -> tuple[Program, Bytes]:
    """The program with its layers in integers, as the module's first lines say, and what in it is bytes."""
    readers: dict[Value, list[Step]] = {}
    for step in program.steps:
        for value in step.needs:
            readers.setdefault(value, []).append(step)
    names = fx.Graph()
    as_bytes: dict[tuple[Value, Affine], Value] = {}
    absorbed: set[Value] = set()
    steps: list[Step] = []
    for step in program.steps:
        if step.value in absorbed:
            continue
        if step.layer is None:
            steps.append(step)
            continue
        layer, x = layers[step.layer], step.args[0]
        if (x, layer.affine) not in as_bytes:
            as_bytes[x, layer.affine] = names.placeholder(f"bytes_{len(as_bytes)}")
            steps.append(Step(as_bytes[x, layer.affine], partial(bytes_of, affine=layer.affine), (x,), {}))
        value, activation = step.value, "none"
        limits: tuple[float, ...] = ()
        after = readers.get(value, [])
        if len(after) == 1 and (found := _activation(after[0])):
            activation, limits = found
            value = after[0].value
            absorbed.add(value)
            after = readers.get(value, [])
        padding = after[0] if len(after) == 1 and _pads_with_zeros(after[0]) else None
        then = _only_reader(readers.get(padding.value, []) if padding else after, layers)
        if then:
            as_bytes[value, then] = value
        function = partial(layer, then=then, activation=activation, limits=limits)
        steps.append(replace(step, value=value, function=function, args=(as_bytes[x, layer.affine],)))
        if then and padding:  # bytes are padded with what stands for zero
            absorbed.add(padding.value)
            as_bytes[padding.value, then] = padding.value
            args = (*padding.args[:2], float(then.zero_point))
            steps.append(Step(padding.value, padding.function, args, {}))
    stands_for = {value: key for key, value in as_bytes.items()}
    return replace(program, steps=free(steps, program.logits)), stands_for


def _activation(step: Step) -> tuple[str, tuple[float, ...]] | None:
    """What oneDNN calls the activation that a step computes."""
    if step.function is _ATEN.relu.default:
        return "relu", ()
    if step.function is _ATEN.hardtanh.default:
        given = step.args[1:]  # without those that are the defaults
        return "hardtanh", tuple(float(limit) for limit in (*given, *(-1.0, 1.0)[len(given) :]))
    return None


def _pads_with_zeros(step: Step) -> bool:
    return step.function is _ATEN.constant_pad_nd.default and not any(step.args[2:])


def _only_reader(readers: Sequence[Step], layers: Sequence[IntegerLayer]) -> Affine | None:
    """The one form, of 8 bits, in which a value is read, if layers alone read it."""
    if not readers or any(step.layer is None for step in readers):
        return None
    affines = {layers[step.layer].affine for step in readers if step.layer is not None}
    return affines.pop() if len(affines) == 1 and next(iter(affines)).bits == _EIGHT else None
