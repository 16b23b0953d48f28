"""Attention whose projections are calls of `Linear` modules, so that they can be quantized.

`nn.MultiheadAttention` and torchvision's windowed attention hand their weights to functions;
a module that is never called cannot be watched or replaced. Here they are made callable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchvision.models.swin_transformer import ShiftedWindowAttention


def separate_projections(network: nn.Module) -> None:
    """Replaces, in place, every attention of `network` by one that calls its projections."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention) and child.in_proj_weight is not None:
                setattr(module, name, SelfAttention(child))
            elif isinstance(child, ShiftedWindowAttention):
                setattr(module, name, WindowAttention(child))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` with query, key and value from one sequence, as two `Linear` layers."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width = attention.embed_dim
        self.heads = attention.num_heads
        self.batch_first = attention.batch_first
        self.in_proj = nn.Linear(width, 3 * width, bias=attention.in_proj_bias is not None)
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = nn.Linear(width, width, bias=attention.out_proj.bias is not None)
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, **options: Any
    ) -> tuple[Tensor, None]:
        """(N, T, E) to (N, T, E); the attention weights are not returned.

        Raises `ValueError` for cross-attention and for masks, which no classifier here uses.
        """
        if key is not query or value is not query or any(mask is not None for mask in options.values()):
            raise ValueError("only self-attention without masks can be quantized")
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.in_proj(x).chunk(3, -1))
        x = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


class WindowAttention(nn.Module):
    """torchvision's windowed attention (Swin, both versions), its `F.linear` calls led to its layers."""

    def __init__(self, attention: ShiftedWindowAttention) -> None:
        super().__init__()
        self.attention = attention
        if hasattr(attention, "logit_scale") and attention.qkv.bias is not None:
            with torch.no_grad():  # version 2 has no bias for keys, and clears it in every pass
                attention.qkv.bias.chunk(3)[1].zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to (N, H, W, C)."""
        with _CallLayers(self.attention.qkv, self.attention.proj):
            return self.attention(x)


class _CallLayers(TorchFunctionMode):
    """Turns `F.linear` with the weight of one of `layers` into a call of that layer."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            for layer in self.layers:
                if layer.weight is args[1]:
                    return layer(args[0])
        return func(*args, **(kwargs or {}))
