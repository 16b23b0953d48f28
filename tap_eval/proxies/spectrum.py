"""What the second moments of a layer's input say of it: how strong it is, and how many directions it takes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tap_eval.images.images import Images
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.quantization.calibration import groups_of
from tap_eval.quantization.moments import Moments, Sums, block_of, together


@torch.no_grad()
def spectra(prepared: Prepared, images: Images | Tensor, at_once: int, memory: int) -> list[tuple[float, float]]:
    """Trace and effective rank of the second moment H, about zero, of each layer's unfolded input on `images`.

    The effective rank is `(tr H)^2 / tr(H^2)`, the participation ratio of the eigenvalues (as in Gao et al. 2017):
    1 where all inputs are multiples of one, and at most their number. It is the exponential of the eigenvalues' Rényi
    entropy of order 2, where Roy and Vetterli (2007) take Shannon's, and needs no eigenvalues. Both are means over the
    groups of a convolution, and zero where no image reaches the layer. `memory` bounds the moments held at a time, in
    bytes: of a layer that is above it, inputs of different blocks count as uncorrelated. `at_once` images go through
    the network together.
    """
    blocks = {index: block_of(module, memory // 2) for index, module in enumerate(prepared.modules)}
    found = [(0.0, 0.0)] * len(blocks)
    for group in together(prepared.modules, blocks, memory):
        sums = {index: _sums(prepared.modules[index], blocks[index]) for index in group}
        for part in images.split(at_once):
            prepared(part, [partial(_take, sums.get(index), each) for index, each in enumerate(prepared.modules)])
        found = [_spectrum(sums[index]) if index in sums else before for index, before in enumerate(found)]
    return found


def _sums(module: Quantizable, block: int) -> Sums:
    shape = (groups_of(module) * module.weight.shape[1], *module.weight.shape[2:])
    zero = torch.zeros(shape, device=module.weight.device)
    return Sums(module, zero, block)


def _take(sums: Sums | None, module: Quantizable, x: Tensor) -> Tensor:
    """The layer's output; its input is taken into `sums`."""
    if sums is not None:
        sums.take(x)
    y: Tensor = module(x)
    return y


def _spectrum(sums: Sums) -> tuple[float, float]:
    if not sums.count:
        return 0.0, 0.0
    moments = sums.moments()
    assert isinstance(moments, Moments)
    matrix = moments.around_zero()
    trace = matrix.diagonal(dim1=2, dim2=3).sum((1, 2), dtype=torch.float64)
    square = matrix.square_().sum((1, 2, 3), dtype=torch.float64)
    rank = trace.square() / square.clamp_min(torch.finfo(torch.float64).tiny)
    return float(trace.mean()), float(rank.mean())
