"""A network that safetensors cannot hold beside what TAP adds: it has a tensor of a name that is taken."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)
        self.conv.weight_scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.conv(x) * self.conv.weight_scale).relu().mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Taken()
