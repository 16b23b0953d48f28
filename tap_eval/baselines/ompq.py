"""OMPQ: layers whose features are orthogonal to those of others get more bits, by a linear programme.

Orthogonality is linear CKA (Kornblith et al. 2019, arXiv:1905.00414) of the features of one batch, the calibration
images. The programme is relaxed to real bits within the paper's ranges: below 4 bits that for post-training
quantization, and from 4 bits on that for training. Its one limit makes it a continuous knapsack, which taking layers by
gain for cost solves exactly. Bits are then rounded down to a choice, and what is left is given out in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tap_eval.allocation.budget import most_uniform, spent
from tap_eval.baselines.gradients import Network
from tap_eval.baselines.rule import Cost, Effort, Found, Rule, by_gains, finite
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BudgetMistake
from tap_eval.quantization.quantizer import Allocation

_VERSION = 1
BETA = 10.0
"""as in the README of its code; scripts there have other values for some networks"""
_LOW, _MIDDLE, _HIGH = 2, 4, 8
"""bits that the ranges [0.25, 0.5] and [0.5, 1] stand for"""
_NOISE = 1e-12
"""of a Gram matrix: centred below it, features are the same for all images, and like those of no other layer"""
_FEATURES = 2**15
"""of an image's output of a layer: of more, so many are taken, evenly"""


def linear_cka(grams: Tensor) -> Tensor:
    """(L, L) in [0, 1], of each pair of Gram matrices (L, N, N): features of N images, multiplied with each other."""
    centring = torch.eye(grams.shape[-1]).to(grams) - 1 / grams.shape[-1]
    centred = (centring @ grams @ centring).flatten(1)
    norms = centred.norm(dim=1)
    norms = torch.where(norms > _NOISE * grams.flatten(1).norm(dim=1), norms, torch.inf)
    return (centred @ centred.T) / norms.outer(norms)


def gains(orthogonality: np.ndarray, beta: float = BETA) -> np.ndarray:
    """What a bit of each layer (L,) adds to the objective: the mean of theta over it and all later layers.

    theta_i = exp(-beta * sum over j != i of ORM_ij). A factor that all layers share is left out, without which there
    would be none but zeros in deep networks.
    """
    gamma = orthogonality.sum(1) - np.diag(orthogonality)
    theta = np.exp(-beta * (gamma - gamma.min()))
    later: np.ndarray = theta[::-1].cumsum()[::-1] / np.arange(len(theta), 0, -1)
    return later


def fill(order: Sequence[int], options: Sequence[Sequence[int]], within: Callable[[Sequence[int]], bool]) -> list[int]:
    """Each layer's least of its `options`, raised as far as all stay `within` the budget, layers in this order."""
    bits = [each[0] for each in options]
    for layer in order:
        for more in options[layer][1:]:
            tried = [*bits[:layer], more, *bits[layer + 1 :]]
            if not within(tried):
                break
            bits = tried
    return bits


def grams(bench: Bench) -> list[list[list[float]]]:
    """Of each layer's outputs for the calibration images, one pass an image: they have the images in any axis."""
    network, images = Network(bench), bench.splits.calibrations[0]

    def features(pixels: Tensor) -> list[Tensor]:
        nothing = torch.zeros(0, device=bench.device)  # of a layer that the image does not reach
        parts = [[nothing] for _ in bench.layers]

        def seen(index: int, _: Tensor, y: Tensor) -> None:
            parts[index].append(y.flatten()[:: -(-y.numel() // _FEATURES)])

        network(pixels, seen)
        return [torch.cat(each).cpu() for each in parts]

    @torch.inference_mode()
    def compute() -> list[list[list[float]]]:
        by_image = [features(pixels) for pixels in images.split(1)]
        by_layer = [pad_sequence(list(each), batch_first=True).double() for each in zip(*by_image, strict=True)]
        return [(each @ each.T).tolist() for each in by_layer]

    return network.computed(compute)


def _find(bench: Bench, _: Effort) -> Found:
    if bench.task.budget.unit == "s":
        raise BudgetMistake("its programme is linear in bits, as time is not: leave ompq out.")
    found, seconds = bench.once(["grams", _VERSION], lambda: grams(bench))
    products = torch.tensor(found, dtype=torch.float64)
    finite(bench, products.sum((1, 2)).tolist())
    gain = gains(linear_cka(products).numpy())
    cost = Cost(len(bench.splits.calibrations[0]), 1, seconds)
    layers, choices, budget = bench.layers, bench.task.choices, bench.task.budget
    order = np.argsort([-gain[layer.index] / budget.cost(layer, 1, 1) for layer in layers], kind="stable")
    for low, high in [*_ranges(bench), (_LOW, _HIGH)]:
        for activation in sorted(choices.activations, reverse=True):
            each = [sorted({bits for bits, its in choices.of(layer)}) for layer in layers]
            options = [[bits for bits in its if low <= bits <= high] or its for its in each]
            held = [max(choices.activations) if len(choices.of(layer)) == 1 else activation for layer in layers]

            def within(bits: Sequence[int], held: Sequence[int] = tuple(held)) -> bool:
                return spent(Allocation(tuple(bits), tuple(held)), layers, budget) <= budget.limit(layers)

            if within([its[0] for its in options]):
                allocation = Allocation(tuple(fill(order.tolist(), options, within)), tuple(held))
                return Found((allocation,), cost, loss=by_gains(gain.tolist()))
    raise AssertionError("the least bits are within the budget")


def _ranges(bench: Bench) -> list[tuple[int, int]]:
    same = most_uniform(bench.layers, {max(bench.task.choices.activations)}, bench.task.budget)
    return [(_LOW, _MIDDLE) if same is None or same.most < _MIDDLE else (_MIDDLE, _HIGH)]


RULE = Rule(
    "OMPQ", "max sum_i b_i mean_{j>=i} exp(-beta sum_{k!=j} CKA_jk)", "Ma et al. 2023, arXiv:2109.07865",
    ("images",), _find,
)  # fmt: skip
