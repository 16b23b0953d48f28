"""Images made of noise, by which a network can be calibrated where there are none.

Batch normalization holds the mean and the variance that its inputs had in training. Noise is changed, by the gradient
of the difference, until the inputs of all of them have these (ZeroQ, Cai et al. 2020, arXiv:2001.00281). ZeroQ leaves
the numbers of an image free; here they stay within what pixels can be, and become bytes in the end, so that the range
of the network's own input is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tap_eval.device import CPU
from tap_eval.images.images import Transform
from tap_eval.mistake import ImagesMistake
from tap_eval.preparing.copying import copy_of, in_eval_mode, unwrapped
from tap_eval.preparing.products import Product
from tap_eval.preparing.torchscript import readable
from tap_eval.preparing.tracing import Call, Norm, Source, Tracing, named_tensors

VERSION = 1
"""part of the name of what is kept: raise it when other images come of the same"""
STEPS = 500
_STEP = 0.1
"""the first of Adam's, in normalized numbers; they end at 0 along half a cosine"""
_EPSILON = 1e-6


def distilled(
    network: nn.Module,
    transform: Transform,
    shape: tuple[int, int, int, int],
    seed: int,
    steps: int = STEPS,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> Tensor:
    """Images (N, C, H, W) uint8 of this `shape`, by which `transform.normalize` gives what `network` takes.

    They are made on the CPU: the same seed gives the same images on the same machine, while a CPU of another kind, or
    another version of PyTorch, may round otherwise. Raises `ImagesMistake` for a network without batch
    normalization.
    """
    network = _still(network, CPU)
    black, white = (transform.normalize(torch.full((1, *shape[1:]), end, dtype=torch.uint8)) for end in (0, 255))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = noise.clamp(black, white).requires_grad_()
    optimizer = torch.optim.Adam([x], _STEP)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _STEP * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        statistics_loss(network, x).backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(black, white)
        advance(step + 1, steps)
    return ((x.detach() - black) / (white - black) * 255).round_().to(torch.uint8)


def statistics_loss(network: nn.Module, pixels: Tensor) -> Tensor:
    """The squared differences of means and of deviations of batch normalizations' inputs from those that they hold.

    In the mean over channels, and summed over all of them.
    """
    with _Norms(network) as norms:
        network(pixels)
    if not norms.losses:
        raise ImagesMistake(
            f"{type(network).__name__} has no batch normalization, whose statistics distilled images would have: give "
            "images with --calibration SOURCE, or leave it out."
        )
    return torch.stack(norms.losses).sum()


def _still(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy in eval mode and float32, of which nothing is to be learned."""
    return in_eval_mode(copy_of(readable(unwrapped(network)), device)).requires_grad_(False).float()


class _Norms(Tracing):
    """A pass that holds the input of each batch normalization against its statistics."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(named_tensors(network))
        self.losses: list[Tensor] = []

    def on_product(self, key: str, source: Source, product: Product, call: Call) -> Any:
        return call()

    def on_norm(self, norm: Norm, call: Call) -> Any:
        if norm.mean is not None and norm.variance is not None:
            others = [axis for axis in range(norm.x.dim()) if axis != 1]
            variance, mean = torch.var_mean(norm.x, others, correction=0)
            off = (variance + _EPSILON).sqrt() - (norm.variance + _EPSILON).sqrt()
            self.losses.append((mean - norm.mean).square().mean() + off.square().mean())
        return call()

    def on_other(self, call: Call) -> Any:
        return call()
