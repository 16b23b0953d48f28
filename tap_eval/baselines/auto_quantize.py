"""Gradient-based scoring as in AutoQuantize: what rounding does to a layer's output, by the loss's gradient there.

A second-order Taylor expansion of the loss by the outputs of layers, the Hessian taken for the squared gradient
(Fisher's). Here with the weights that are measured, rounded as the run rounds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tap_eval.allocation.choices import uniform
from tap_eval.baselines.gradients import Network
from tap_eval.baselines.rule import Cost, Effort, Found, Rule, by_losses, finite, minimizing
from tap_eval.measuring.bench import Bench
from tap_eval.preparing.products import Quantizable, multiply
from tap_eval.quantization.quantizer import VERSION as QUANTIZER

_VERSION = 2
Other = Mapping[int, tuple[Tensor, Tensor | None]]
"""a layer's weight and bias by bits"""


@dataclass(frozen=True)
class Call:
    """A layer's input and output, with the graph of what computed it."""

    index: int
    x: Tensor
    y: Tensor


def taylor(loss: Tensor, calls: Sequence[Call], modules: Sequence[Quantizable], others: Sequence[Other]) -> Tensor:
    """(L, bits) sum over outputs of (dL/dy)^2 (y_b - y)^2, of layers with `others` as weight and bias."""
    gradients = torch.autograd.grad(loss, [call.y for call in calls], materialize_grads=True)
    found = torch.zeros(len(modules), len(others[0]), dtype=torch.float64)
    with torch.no_grad():
        for call, gradient in zip(calls, gradients, strict=True):
            for column, (weight, bias) in enumerate(others[call.index].values()):
                change = multiply(modules[call.index], call.x, weight, bias) - call.y
                found[call.index, column] += float((gradient * change).square().sum())
    return found


def scores(bench: Bench, bits: Sequence[int]) -> list[list[float]]:
    """Of each layer at each of `bits`, by the mean cross entropy of the calibration images."""
    network = Network(bench)
    others: list[dict[int, tuple[Tensor, Tensor | None]]] = [{} for _ in bench.layers]
    for each in bits:
        rounded = bench.quantized(uniform(bench.layers, each, max(bench.task.choices.activations)), finished=False)
        for layer, other in zip(rounded.layers, others, strict=True):
            assert layer.weight is not None
            other[each] = (layer.weight.real().to(bench.device), layer.weight.bias.to(bench.device))

    def compute() -> list[list[float]]:
        network.check()
        total = torch.zeros(len(bench.layers), len(bits), dtype=torch.float64)
        for pixels, labels in network.batches():
            calls: list[Call] = []
            logits = network(pixels, lambda index, x, y, to=calls: to.append(Call(index, x, y)))  # type: ignore[misc]
            loss = F.cross_entropy(logits, labels, reduction="sum") / len(bench.splits.calibrations[0])
            total += taylor(loss, calls, bench.prepared.modules, others)
        found: list[list[float]] = total.tolist()
        return found

    return network.computed(compute)


def _find(bench: Bench, _: Effort) -> Found:
    bits = sorted(bench.task.choices.weights)
    what = ["auto_quantize", _VERSION, QUANTIZER, bits, *bench.rounded_by]
    found, seconds = bench.once(what, lambda: scores(bench, bits), rounded=True)
    finite(bench, [sum(each) for each in found])
    losses = [dict(zip(bits, each, strict=True)) for each in found]
    return minimizing(bench, by_losses(losses), Cost(len(bench.splits.calibrations[0]), 1, seconds, True))


RULE = Rule(
    "AutoQuantize", "min sum_i sum((dL/dy_i)^2 (Q_b(y_i) - y_i)^2)", "gradient scoring of NVIDIA Model Optimizer",
    ("weights", "images", "labels", "gradients"), _find,
)  # fmt: skip
