"""One call for code that has a network in its hands: bits allocated, weights rounded and finished."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget, check_feasible, most_uniform
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.size import FLOAT, Size, packed_size
from tap_eval.export import pt2, safetensors
from tap_eval.export.extra import onnx
from tap_eval.export.remaining import Remaining
from tap_eval.kept import Kept
from tap_eval.measuring.progress import silent
from tap_eval.measuring.recipe import Bounds
from tap_eval.measuring.recorder import Recorder
from tap_eval.measuring.rounded import RoundedWeights
from tap_eval.measuring.task import Attention
from tap_eval.mistake import BudgetMistake, ExportMistake, ImagesMistake, ProxyMistake
from tap_eval.preparing.layers import Layer
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared, attending
from tap_eval.proxies.features import Features, describe, describe_task
from tap_eval.proxies.proxy import Rejection, checked_scores
from tap_eval.proxies.published import NAMES, module
from tap_eval.quantization.calibration import calibrate, calibrate_operands
from tap_eval.quantization.finishing import finish
from tap_eval.quantization.integer import Unfit
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork
from tap_eval.quantization.ranges import RangeRule
from tap_eval.quantization.sums import Sums, SumsIn, calibrated, ranged

Sensitivity = Callable[[list[Features], Features], Any]
"""A proxy as a function: a score a layer, or a list of scores, one an output channel."""


@dataclass(frozen=True)
class Quantized:
    """A quantized network, and what became of its layers."""

    network: QuantizedNetwork
    allocation: Allocation
    size: Size
    """bytes of the whole, packed"""
    images: Tensor
    """(N, C, H, W), the calibration images, on which a file is held against the network"""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """In the order of the allocation."""
        return self.network.prepared.layers

    def save(self, path: Path | str, *, strict: bool = False) -> Remaining:
        """Writes the network, packed, to `path`, whose ending says how: .safetensors, .onnx or .pt2.

        Gives what is in float32 in it, whose `sentences` tell it. Raises `ExportMistake` for another ending, without
        the extra `onnx`, for what a format has no place for, and if `strict` where anything is in float32.
        """
        path = Path(path)
        match path.suffix:
            case ".safetensors":
                return safetensors.write(path, self.network, self.allocation, {}, strict=strict)
            case ".onnx":
                return onnx().write(path, self.network, self.allocation, self.images, {}, strict=strict)
            case ".pt2":
                return pt2.write(path, self.network, self.allocation, self.images, {}, strict=strict)
            case _:
                raise ExportMistake(f"'{path.name}' does not end in .safetensors, .onnx or .pt2: give one of these.")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) float32, as the network wants them, to logits (N, classes)."""
        return self.network.logits(images, self.network.prepared.batch)


def quantize(
    network: nn.Module,
    images: Tensor,
    budget: str,
    rule: str | Sensitivity = "paper",
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    finished: bool = True,
    sums: SumsIn = "int8",
    activation_ranges: RangeRule = "minmax",
    attention_activations: Attention = "8",
) -> Quantized:
    """`network`, a classifier in eval mode, within `budget`, as in "4bit", "87%", "0.5MB" or "1.2GBOPs".

    `images` are some 16 calibration images (N, C, H, W), float32, as the network wants them; no labels. `rule` says
    how sensitive layers are: a function `sensitivity(layers, task)` of your own, the name of a published proxy, or
    "uniform", the most bits from 2 to 8 that are the same everywhere. Otherwise weights get some of `bits`. Inputs
    of layers get 8. `finished` rounds each layer once more for the inputs that it then gets. With `sums` "int8" what is
    added, pooled and joined between convolutions is in 8 bits too, as runtimes fuse it; a network whose steps
    cannot be recorded keeps it in float32, of which a warning tells. `activation_ranges` is how ranges of
    activations are chosen from the images; what attention multiplies is in 8 bits too, unless
    `attention_activations` is "off". Raises `NetworkMistake`, `ImagesMistake`, `BudgetMistake`, `BitsMistake` or
    `ProxyMistake`.
    """
    if images.dim() != 4 or not len(images) or images.dtype != torch.float32:
        raise ImagesMistake(
            f"calibration images are {tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}: give some as "
            "(N, C, H, W) of float32."
        )
    with torch.autocast("cpu", enabled=False):  # which a caller may have on
        bounds, prepared = Bounds(), prepare(network, images[:2], [images])
        prepared = attending(prepared) if attention_activations == "8" else prepared
        carried = _sums(prepared, images, activation_ranges) if sums == "int8" else None
        between = ranged(carried.recorded(prepared.batch) if carried else None, prepared)
        if Budget.parse(budget).unit == "s":
            raise BudgetMistake(
                f"{budget} is a budget in time, for which no latencies can be given here: give one of size."
            )
        limit, choices = Budget.parse(budget).beside(FLOAT * prepared.left, between), Choices(tuple(bits))
        check_feasible(prepared.layers, choices, limit)
        allocation = _allocated(rule, prepared, images, choices, limit)
        seen = prepared.fitting(lambda: calibrate(prepared, images, activation_ranges))
        operands = prepared.fitting(lambda: calibrate_operands(prepared, images, activation_ranges))
        weights = RoundedWeights(
            prepared, images, seen, "gptq", choices.weights, [], Kept(None), bounds.moments, silent
        )
        integers = [partial(weights, layer.index) for layer in prepared.layers]
        quantized = QuantizedNetwork(prepared, seen, integers, carried, operands)
        quantized.choose(allocation)
        if finished:
            dampings = [weights.damping(index, each) for index, each in enumerate(allocation.weights)]
            finish(
                quantized, Recorder(prepared, images).evenly(len(images)), images, allocation, dampings, bounds.moments
            )
        size = packed_size(prepared.layers, allocation, FLOAT * prepared.left, between)
        return Quantized(quantized, allocation, size, images)


def _sums(prepared: Prepared, images: Tensor, rule: RangeRule) -> Sums | None:
    """What is needed to round what travels between layers; None where steps cannot be recorded."""
    try:
        return calibrated(Recorder(prepared, images), prepared, images, rule)
    except Unfit as reason:
        warnings.warn(f"sums between layers stay in float32, since {reason}", stacklevel=3)
        return None


def _allocated(
    rule: str | Sensitivity, prepared: Prepared, images: Tensor, choices: Choices, budget: Budget
) -> Allocation:
    layers = prepared.layers
    if rule == "uniform":
        same = most_uniform(layers, choices.activations, budget)
        assert same  # the least of the choices, which are no fewer bits, are within the budget
        return same
    if isinstance(rule, str) and rule not in NAMES:
        raise ProxyMistake(
            f"'{rule}' is no rule: give a function sensitivity(layers, task), {', '.join(NAMES)} or uniform."
        )
    sensitivity: Sensitivity = module(rule).sensitivity if isinstance(rule, str) else rule
    classes = prepared(images[:1]).shape[1]
    task = describe_task(layers, images.shape[-1], "images", classes, choices, budget)
    found = sensitivity(describe(prepared, images, "statistics", Bounds().features, choices.weights), task)
    scores = checked_scores(found, [layer.out_channels for layer in layers], by_channel=False)
    if isinstance(scores, Rejection):
        raise ProxyMistake(f"the rule fails ({scores.failure}): {scores.message}")
    return allocate(scores, layers, choices, budget)
