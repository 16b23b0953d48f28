"""What a layer of a network is, apart from its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tap_eval.preparing.products import Quantizable


@dataclass(frozen=True)
class Layer:
    """A quantizable layer. Sizes are pixels, `tokens` is the length of a sequence, else 1."""

    name: str
    kind: str
    """conv, depthwise, linear or attention"""
    block: str
    """the module that holds it, "" for the network itself"""
    index: int
    depth: float
    """position in (0, 1]"""
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    groups: int
    input_size: int
    output_size: int
    tokens: int
    params: int
    """weight elements, without the bias"""
    macs: int
    """multiply-accumulates an image"""
    first: bool
    last: bool


@dataclass(frozen=True)
class Use:
    """One call of a layer: the shapes of its input and output, and how often it takes every weight."""

    input: torch.Size
    output: torch.Size
    positions: int


def describe(name: str, module: Quantizable, uses: Sequence[Use], images: int, index: int, count: int) -> Layer:
    """The layer called `name`, the `index`-th of `count`, from its calls in one pass over so many images.

    Sizes are those of its first call.
    """
    first = uses[0]
    shared: dict[str, Any] = {
        "name": name,
        "block": name.rpartition(".")[0],
        "index": index,
        "depth": (index + 1) / count,
        "params": module.weight.numel(),
        "macs": round(module.weight.numel() * sum(use.positions for use in uses) / images),
        "first": index == 0,
        "last": index == count - 1,
    }
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups > 1 and module.groups == module.in_channels
        return Layer(
            **shared,
            kind="depthwise" if depthwise else "conv",
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel=max(module.kernel_size),
            stride=max(module.stride),
            groups=module.groups,
            input_size=first.input[-1],
            output_size=first.output[-1],
            tokens=1,
        )
    return Layer(
        **shared,
        kind="attention" if "attn" in name or "attention" in name else "linear",
        in_channels=module.in_features,
        out_channels=module.out_features,
        kernel=1,
        stride=1,
        groups=1,
        input_size=1,
        output_size=1,
        tokens=max(first.positions // images, 1),
    )
