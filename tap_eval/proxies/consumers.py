"""What becomes of a layer's output: through which operations it goes, and which layers read it, how strongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.preparing.program import Step, Value, readers_of, record

_WORDS = {
    **dict.fromkeys(("relu", "hardtanh", "relu6", "clamp", "clamp_min"), "relu"),
    **dict.fromkeys(("add", "sub"), "addition"),
    **dict.fromkeys(("mul", "div", "bmm", "matmul", "mm"), "product"),
    **dict.fromkeys(("cat", "concat", "stack"), "concatenation"),
    **dict.fromkeys(("mean", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"), "average"),
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices"), "maximum"),
    **dict.fromkeys(("native_layer_norm", "native_group_norm", "layer_norm", "group_norm"), "norm"),
    **{name: name for name in ("gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "elu", "leaky_relu", "tanh")},
    **dict.fromkeys(("_softmax", "softmax", "_safe_softmax"), "softmax"),
}
"""operations that change numbers, by the names of ATen; others move them"""
OPERATIONS = tuple(dict.fromkeys(_WORDS.values()))


@dataclass(frozen=True)
class Consumers:
    """Of a layer's output, up to the second addition on its way."""

    operations: tuple[str, ...] = ()
    """of `OPERATIONS`, in order, each once"""
    layers: tuple[int, ...] = ()
    """indices of the layers that read it, or what operations make of it"""


def consumers(prepared: Prepared, example: Tensor) -> list[Consumers]:
    """Those of each layer, empty where the steps of the network, run on `example`, cannot be recorded."""
    try:
        steps = record(prepared, example).steps
    except Exception:  # noqa: BLE001 whatever tracing raises of networks whose way through their code is not fixed
        return [Consumers()] * len(prepared.layers)
    readers = readers_of(steps)
    found = [Consumers()] * len(prepared.layers)
    for step in steps:
        if step.layer is not None:
            before = found[step.layer]
            operations, layers = _followed(step.value, readers)
            found[step.layer] = Consumers(
                tuple(dict.fromkeys((*before.operations, *operations))), tuple(sorted({*before.layers, *layers}))
            )
    return found


def _followed(value: Value, readers: Mapping[Value, Sequence[Step]]) -> tuple[list[str], set[int]]:
    operations: list[str] = []
    layers: set[int] = set()
    waiting, seen = [(value, 0)], {value}
    for at, additions in waiting:
        for step in readers.get(at, ()):
            if step.layer is not None:
                layers.add(step.layer)
                continue
            word = _WORDS.get(str(getattr(step.function, "__name__", step.function)).split(".")[0])
            if word == "addition" and additions:
                continue
            operations += [word] if word else []
            if step.value not in seen:
                seen.add(step.value)
                waiting.append((step.value, additions + (word == "addition")))
    return list(dict.fromkeys(operations)), layers


@torch.no_grad()
def weight_on(module: Quantizable, reading: Sequence[Quantizable]) -> Tensor:
    """(O,) root of the sum of squares of the weights of `reading` layers that each output channel of `module` meets.

    Of layers that read as many channels as there are, and of linear ones that read a convolution's flattened pixels;
    others count nothing.
    """
    channels = len(module.weight)
    total = torch.zeros(channels, dtype=torch.float64)
    for other in reading:
        weight = other.weight.double().cpu()
        if isinstance(other, nn.Conv2d):
            if other.in_channels == channels:
                squares = weight.square().sum((2, 3)).view(other.groups, -1, channels // other.groups)
                total += squares.sum(1).flatten()
        elif other.in_features % channels == 0 and (other.in_features == channels or isinstance(module, nn.Conv2d)):
            total += weight.square().view(len(weight), channels, -1).sum((0, 2))
    return total.sqrt()
