"""Gradients and Hessian-vector products of a loss, by the weights of a prepared network's layers.

The loss is a mean over calibration images, in full precision; batch normalization is folded into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tap_eval.device import CPU, alone
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import ImagesMistake, NetworkMistake
from tap_eval.preparing.prepared import Prepared, Room
from tap_eval.preparing.products import multiply

Gradients = list[Tensor]
"""one a layer, of the form of its weight"""
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Loss:
    """A loss as a function of `weights`, in parts whose sum it is, each computed when it is called."""

    weights: Sequence[Tensor]
    """leaves that gradients are taken of"""
    parts: Sequence[Callable[[], Tensor]]

    def gradients(self) -> Gradients:
        """Zero where the loss does not depend on a weight."""
        found = [torch.autograd.grad(part(), list(self.weights), materialize_grads=True) for part in self.parts]
        return [torch.stack(each).sum(0) for each in zip(*found, strict=True)]

    def hessian(self, index: int) -> Callable[[Tensor], Tensor]:
        """Multiplies a vector of the form of the weight at `index` with the Hessian by this weight alone.

        A loss of one part is computed once for all products, and held in memory as long as the function is.
        """
        weight = self.weights[index]

        def differentiated(part: Callable[[], Tensor]) -> Tensor:
            (found,) = torch.autograd.grad(part(), weight, create_graph=True, materialize_grads=True)
            return found if found.requires_grad else found + 0 * weight  # where it is constant

        held = [differentiated(self.parts[0])] if len(self.parts) == 1 else None

        def product(vector: Tensor) -> Tensor:
            total = torch.zeros_like(weight)
            for gradient in held or map(differentiated, self.parts):
                (found,) = torch.autograd.grad(
                    gradient, weight, vector, retain_graph=held is not None, materialize_grads=True
                )
                total = total + found
            return total

        return product


class Network:
    """A prepared network on the device of its bench, with weights of its own that gradients are taken of."""

    def __init__(self, bench: Bench, prepared: Prepared | None = None) -> None:
        """`prepared` is that of the bench, or one made of it."""
        prepared = prepared or bench.prepared
        # of its own, since what takes gradients needs more memory than what is measured
        self._prepared = replace(prepared, room=Room()) if bench.device == CPU else prepared.on(bench.device)
        self._bench = bench
        modules = self._prepared.modules
        self.weights = [module.weight.detach().clone().requires_grad_() for module in modules]
        self.biases = [module.bias for module in modules]

    def __call__(self, pixels: Tensor, seen: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
        """Logits (N, classes) of `pixels` (N, C, H, W); `seen` is told of each layer's index, input and output."""

        def run(index: int, x: Tensor) -> Tensor:
            y = self._multiplied(index, x)
            if seen is None:
                return y
            seen(index, x, y)
            return y.clone()  # the network may go on in its place

        with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
            return self._prepared(pixels, [partial(run, index) for index in range(len(self.weights))])

    def _multiplied(self, index: int, x: Tensor) -> Tensor:
        """A layer's output, by its own weights here."""
        return multiply(self._prepared.modules[index], x, self.weights[index], self.biases[index])

    @property
    def _two(self) -> Tensor:
        """Calibration images (2, C, H, W), where and as the weights are."""
        return self._bench.splits.calibrations[0].pixels[:2].to(self.weights[0])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Calibration images (N, C, H, W) of the first draw, with their labels (N,)."""
        images, size = self._bench.splits.calibrations[0], self._prepared.batch
        if not len(images.labels) or int(images.labels.min()) < 0:
            raise ImagesMistake(
                f"{self._bench.splits.name} has no labels of its calibration images: leave out of --baselines what "
                "needs them."
            )
        for pixels, labels in zip(images.split(size), images.labels.split(size), strict=True):
            yield pixels.to(self._prepared.device), labels.to(self._prepared.device)

    def cross_entropy(self) -> Loss:
        """Of the labels of the calibration images, the mean in nats."""
        self.check()
        count = len(self._bench.splits.calibrations[0])

        def part(pixels: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self(pixels), labels, reduction="sum") / count

        return Loss(self.weights, [partial(part, *batch) for batch in self.batches()])

    def sum_of_logits(self) -> Loss:
        """For one image that is all ones."""
        self.check()
        pixels = torch.ones_like(self._bench.splits.calibrations[0].pixels[:1])
        kind = self.weights[0].dtype
        return Loss(self.weights, [lambda: self(pixels.to(self._prepared.device, kind)).sum()])

    def scores(self, loss: Callable[[], Loss], score: Callable[[Tensor, Tensor], float]) -> list[float]:
        """`score` of each layer's weight and the gradient of the loss by it."""
        gradients = self.computed(lambda: loss().gradients())
        return [score(weight.detach(), gradient) for weight, gradient in zip(self.weights, gradients, strict=True)]

    def check(self) -> None:
        """Raises `NetworkMistake` where no gradient reaches a layer that outputs depend on, as in `torch.no_grad`."""
        reached: set[int] = set()
        logits = self(self._two, lambda index, *_: reached.add(index))
        found = torch.autograd.grad(logits.sum(), self.weights, allow_unused=True)
        for index in sorted(reached):
            if found[index] is None and self.matters(index):
                raise NetworkMistake(
                    f"{self._bench.name} has no gradients in {self._prepared.layers[index].name}, since its code stops "
                    "them: leave out of --baselines what needs them."
                )

    @torch.no_grad()
    def matters(self, layer: int) -> bool:
        """Whether outputs for two images are others where those of a layer, by index, are."""

        def logits(disturbed: int | None) -> Tensor:
            def run(index: int, x: Tensor) -> Tensor:
                y = self._multiplied(index, x)
                return (y + 1) * torch.arange(y.numel()).to(y).sin().view_as(y) if index == disturbed else y

            return self._prepared(self._two, [partial(run, index) for index in range(len(self.weights))])

        return not torch.equal(logits(layer), logits(None))

    def computed(self, compute: Callable[[], _Result]) -> _Result:
        """`compute()`, in smaller batches where memory is too small; raises `NetworkMistake` where it fails."""
        try:
            with alone(self._bench.device):
                return self._prepared.fitting(compute)
        except RuntimeError as error:
            raise NetworkMistake(
                f"{self._bench.name} does not run as this baseline needs it ({' '.join(str(error).split())[:200]}): "
                "leave it out of --baselines."
            ) from error


def saliency(weight: Tensor, gradient: Tensor) -> float:
    """sum |dL/dm| of one layer, by a mask m of ones on its weights: |g w| (Lee et al. 2019; Tanaka et al. 2020)."""
    return float((gradient * weight).abs().double().sum())
