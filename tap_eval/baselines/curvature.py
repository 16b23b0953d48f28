"""What is known of a Hessian from its products with vectors: top eigenvalues, and traces.

At most 100 products each, fewer where the estimate moves by less than a thousandth, as HAWQ has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tap_eval.baselines.gradients import Loss, Network
from tap_eval.baselines.rule import finite
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Timed

_STEPS, _TOLERANCE = 100, 1e-3
_TINY = 1e-6
"""beside which an estimate of 0 has settled too"""
Kind = Literal["eigenvalues", "traces"]
Product = Callable[[Tensor], Tensor]
Estimate = Callable[[Product, Tensor, torch.Generator], tuple[float, int]]
"""a figure of the Hessian by a weight, given its product with vectors and that weight, and how many products it took"""
Recall = Callable[[int, Callable[[], tuple[float, int]]], tuple[float, int]]
"""such a figure of a layer by its index: what is known of it, or what the function computes"""


def _anew(index: int, compute: Callable[[], tuple[float, int]]) -> tuple[float, int]:
    return compute()


def top_eigenvalues(loss: Loss, seed: int, recall: Recall = _anew) -> tuple[list[float], int]:
    """The largest eigenvalue by its size of the Hessian by each of the weights alone, and how many products it took.

    By power iteration, from a random vector.
    """
    return _of_each(loss, _top_eigenvalue, lambda weight, generator, steps: _normal(weight, generator), seed, recall)


def _top_eigenvalue(product: Product, weight: Tensor, generator: torch.Generator) -> tuple[float, int]:
    vector, known = _normal(weight, generator), 0.0
    for step in range(1, _STEPS + 1):
        vector = vector / vector.norm()
        multiplied = product(vector)
        value = float((vector * multiplied).sum())
        if float(multiplied.norm()) == 0 or (step > 1 and _settled(value, known)):
            return value, step
        known, vector = value, multiplied
    return known, _STEPS


def traces(loss: Loss, seed: int, recall: Recall = _anew) -> tuple[list[float], int]:
    """The trace of the Hessian by each of the weights alone, and how many products they took.

    By Hutchinson's method: the mean of v H v over vectors v of random signs. One of all weights together would give all
    traces at once, but what it adds for pairs of weights is large beside them, though zero in the mean.
    """

    def drawn(weight: Tensor, generator: torch.Generator, steps: int) -> None:
        for _ in range(steps):
            _signs(weight, generator)

    return _of_each(loss, _trace, drawn, seed, recall)


def _trace(product: Product, weight: Tensor, generator: torch.Generator) -> tuple[float, int]:
    total = 0.0
    for step in range(1, _STEPS + 1):
        signs = _signs(weight, generator)
        before, total = total, total + float((signs * product(signs)).sum())
        if step > 1 and _settled(total / step, before / (step - 1)):
            break
    return total / step, step


def _of_each(
    loss: Loss, estimate: Estimate, drawn: Callable[[Tensor, torch.Generator, int], object], seed: int, recall: Recall
) -> tuple[list[float], int]:
    """`drawn` draws what an estimate of so many products does."""
    generator, found = torch.Generator().manual_seed(seed), list[tuple[float, int]]()
    for index, weight in enumerate(loss.weights):
        before = generator.get_state()
        value, steps = recall(index, lambda: estimate(loss.hessian(index), weight, generator))  # noqa: B023 at once
        if torch.equal(generator.get_state(), before):  # it was known: what follows is as if it had been computed
            drawn(weight, generator, steps)
        found.append((value, steps))
    return [value for value, _ in found], sum(steps for _, steps in found)


def _settled(value: float, before: float) -> bool:
    return abs(value - before) < _TOLERANCE * (abs(before) + _TINY)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).mul(2).sub(1).to(like)


def curvature(
    bench: Bench, kind: Kind, estimate: Callable[[Loss, int, Recall], tuple[list[float], int]], seed: int
) -> Timed[tuple[list[float], int]]:
    """An estimate for the layers of `bench`, of the mean cross entropy of calibration images; kept as `kind`.

    Each layer's is kept too: what may take hours goes on where it was interrupted, and its seconds are all of them.
    Raises `NetworkMistake` where it is not finite, as where a gradient has an infinite slope.
    """
    what = [kind, VERSIONS[kind], seed]

    def compute() -> tuple[list[float], int, float]:
        network, began, taken = Network(bench), time.perf_counter(), dict[int, float]()

        def recall(index: int, compute: Callable[[], tuple[float, int]]) -> tuple[float, int]:
            known = bench.once([*what, "of layer", index], compute)
            taken[index] = known.seconds
            return known.value

        values, steps = network.computed(lambda: estimate(network.cross_entropy(), seed, recall))
        return values, steps, max(sum(taken.values()) - (time.perf_counter() - began), 0.0)

    (values, steps, *earlier), seconds = bench.once(what, compute)
    finite(bench, values)
    return Timed((values, steps), seconds + sum(earlier))


VERSIONS: dict[Kind, int] = {"eigenvalues": 1, "traces": 2}
"""part of the key of what is kept: raise one when a change to gradients or to what is here changes its results"""
