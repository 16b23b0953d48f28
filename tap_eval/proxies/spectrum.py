"""What second moments of a layer's input say: its strength, how many directions it takes, what rounding costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tap_eval.images.images import Images
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.quantization.moments import Moments, Sums, block_of, together
from tap_eval.quantization.rounding import grouped, nearest


@dataclass(frozen=True)
class Spectrum:
    """Of a layer's unfolded input."""

    trace: float
    rank: float
    errors: dict[int, Tensor]
    """by bits, (O,): the mean squared error that weights rounded to the nearest add to each output channel, but for the
    shift of its mean"""


@torch.no_grad()
def spectra(
    prepared: Prepared, images: Images | Tensor, at_once: int, memory: int, bits: Sequence[int]
) -> list[Spectrum]:
    """Trace and effective rank of the second moment H, about zero, of each layer's unfolded input on `images`, and what
    rounding the layer's weights to each of `bits` costs by the second moment about the mean.

    The effective rank is `(tr H)^2 / tr(H^2)`, the participation ratio of the eigenvalues (as in Gao et al. 2017):
    1 where all inputs are multiples of one, and at most their number. It is the exponential of the eigenvalues' Rényi
    entropy of order 2, where Roy and Vetterli (2007) take Shannon's, and needs no eigenvalues. Both are means over the
    groups of a convolution. `memory` bounds the moments held at a time, in
    bytes: of a layer that is above it, inputs of different blocks count as uncorrelated. `at_once` images go through
    the network together. A layer that none of `images` reaches has those of the images on which it was found.
    """
    blocks = {index: block_of(module, memory // 2) for index, module in enumerate(prepared.modules)}
    found: dict[int, Spectrum] = {}
    for group in together(prepared.modules, blocks, memory):
        sums = {index: Sums(prepared.modules[index], blocks[index]) for index in group}
        for source, size in prepared.reaching(images, at_once):
            missing = {index: each for index, each in sums.items() if not each.count}
            layers = [partial(_take, missing.get(index), module) for index, module in enumerate(prepared.modules)]
            for part in source.split(size) if missing else ():
                prepared(part, layers)
        found |= {index: _spectrum(prepared.modules[index], each, bits) for index, each in sums.items()}
    return [found[index] for index in range(len(prepared.modules))]


def _take(sums: Sums | None, module: Quantizable, x: Tensor) -> Tensor:
    """The layer's output; its input is taken into `sums`."""
    if sums is not None:
        sums.take(x)
    y: Tensor = module(x)
    return y


def _spectrum(module: Quantizable, sums: Sums, bits: Sequence[int]) -> Spectrum:
    moments = sums.moments()
    assert isinstance(moments, Moments)
    errors = {each: _error(module.weight, moments, each) for each in bits}
    matrix = moments.around_zero()
    trace = matrix.diagonal(dim1=2, dim2=3).sum((1, 2), dtype=torch.float64)
    square = matrix.square_().sum((1, 2, 3), dtype=torch.float64)
    rank = trace.square() / square.clamp_min(torch.finfo(torch.float64).tiny)
    return Spectrum(float(trace.mean()), float(rank.mean()), errors)


def _error(weight: Tensor, moments: Moments, bits: int) -> Tensor:
    """Of each output channel, (O,)."""
    off = grouped(nearest(weight, bits).real() - weight, moments)
    return ((off @ moments.matrix) * off).sum((1, 3), dtype=torch.float64).flatten().clamp_min(0)
