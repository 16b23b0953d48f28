"""Rounded weights: every layer at every bits, each computed once and kept on disk under what it depends on."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tap_eval.device import on
from tap_eval.kept import Kept
from tap_eval.measuring.ledger import key
from tap_eval.measuring.progress import Advance
from tap_eval.measuring.threads import one_thread_each
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.quantization.calibration import Observation
from tap_eval.quantization.gptq import gptq
from tap_eval.quantization.moments import HELD_OUT, Few, Moments, block_of, second_moments, together
from tap_eval.quantization.quantizer import VERSION, LayerBits, distinct
from tap_eval.quantization.rounding import Rounded, Rounding, nearest


class RoundedWeights:
    """Those of a network for one draw of calibration images."""

    def __init__(
        self,
        prepared: Prepared,
        pixels: Tensor,
        seen: Sequence[Observation],
        rounding: Rounding,
        choices: Sequence[int],
        content: Sequence[str],
        kept: Kept,
        memory: int,
        advance: Advance,
    ) -> None:
        """`choices` are bits that are rounded together; `content` names network and images; `memory` bounds the second
        moments that are held at a time, in bytes."""
        self._prepared = prepared
        self._pixels = pixels
        self._seen = seen
        self._rounding = rounding
        self._choices = choices
        self._content = content
        self._kept = kept
        self._memory = memory
        self._advance = advance
        self._lock = threading.RLock()
        self._held: dict[tuple[int, int], Rounded] = {}
        self._dampings: dict[tuple[int, int], float] = {}
        """of each (layer index, bits) so far, 0 where none was chosen, and infinite where it is the nearest since GPTQ
        was worse on images left out"""

    def __call__(self, index: int, bits: int) -> Rounded:
        """Layer `index` at `bits`."""
        with self._lock:
            if (index, bits) not in self._held:
                self._fill(sorted({bits, *self._choices}) if bits in self._choices else [bits])
            return self._held[index, bits]

    def damping(self, index: int, bits: LayerBits) -> float:
        """With which GPTQ does best on images left out, the largest of several bits; 0 where none was chosen, infinite
        where it does worse than the nearest."""
        for each in distinct(bits):
            self(index, each)
        return max(self._dampings[index, each] for each in distinct(bits))

    @property
    def fallen(self) -> tuple[int, int]:
        """How many weights, by layer and bits, are the nearest since GPTQ was worse on images left out, of how many."""
        return sum(each == math.inf for each in self._dampings.values()), len(self._dampings)

    @property
    def blocked(self) -> list[str]:
        """Layers whose inputs are taken in blocks, since their second moments are above what may be held."""
        return [
            layer.name
            for layer, module in zip(self._prepared.layers, self._prepared.modules, strict=True)
            if self._rounding == "gptq" and self._block(layer.index) < module.weight[0].numel()
        ]

    def _fill(self, bits: Sequence[int]) -> None:
        """Rounds every layer at these bits, but for what is kept."""
        missing: list[int] = []
        for layer in self._prepared.layers:
            for each in bits:
                if tensors := self._kept.recall(self._name(layer.index, each, bits)):
                    rounded = on(Rounded(tensors["integers"], tensors["scale"]), self._prepared.device)
                    self._take(layer.index, each, rounded, float(tensors["damping"]))
                else:  # all bits again, as they are rounded together
                    missing.append(layer.index)
                    break
        done = 0
        with one_thread_each(self._prepared.device) as threads:
            blocks = {index: self._block(index) for index in missing}
            for group in together(self._prepared.modules, blocks, self._memory):
                fit, held = self._prepared.fitting(partial(self._moments, group))
                jobs = [
                    threads.submit(
                        _rounded, self._prepared.modules[index].weight, fit.get(index), held.get(index), bits
                    )
                    for index in group
                ]
                for index, job in zip(group, jobs, strict=True):
                    for each, (rounded, damping) in zip(bits, job.result(), strict=True):
                        self._take(index, each, rounded, damping)
                        tensors = {**vars(rounded), "damping": torch.tensor(damping, dtype=torch.float64)}
                        self._kept.keep(self._name(index, each, bits), tensors)
                    done += 1
                    self._advance("rounding layers", done, len(missing))

    def _take(self, index: int, bits: int, rounded: Rounded, damping: float) -> None:
        self._held[index, bits] = rounded
        self._dampings[index, bits] = damping

    def _name(self, index: int, bits: int, together: Sequence[int]) -> str:
        """Of what is kept: the last digit of a scale hangs on the bits that are rounded together."""
        return key("rounded", VERSION, self._rounding, self._content, self._block(index), index, bits, together)

    def _block(self, index: int) -> int:
        return block_of(self._prepared.modules[index], self._memory // 2)

    def _moments(self, group: Sequence[int]) -> tuple[dict[int, Moments | Few], dict[int, Moments | Few]]:
        """Those of the images that weights are fitted to, and of those that are left out; neither for the nearest."""
        if self._rounding == "nearest":
            return {}, {}
        blocks = {index: self._block(index) for index in group}
        held = len(self._pixels) // HELD_OUT
        fit = second_moments(self._prepared, self._pixels[held:], self._seen, blocks)
        return fit, second_moments(self._prepared, self._pixels[:held], self._seen, blocks) if held else {}


def _rounded(
    weight: Tensor, fit: Moments | Few | None, held: Moments | Few | None, bits: Sequence[int]
) -> list[tuple[Rounded, float]]:
    """A layer at each of `bits`, and the damping with which it is."""
    if fit is None:  # for the nearest, or of a layer that no image reaches
        return [(nearest(weight, each), 0.0) for each in bits]
    found = gptq(weight, fit, held, bits)
    return [each or (nearest(weight, its), math.inf) for each, its in zip(found, bits, strict=True)]


def rounding_errors(layers: Sequence[Quantizable], choices: Sequence[int]) -> list[list[float]]:
    """||Q_b(W) - W||^2 of each layer, rounded to the nearest, at each of the bits `choices`."""

    @torch.no_grad()
    def errors(layer: Quantizable) -> list[float]:
        weight = layer.weight
        return [float((nearest(weight, bits).real() - weight).double().square().sum()) for bits in choices]

    with one_thread_each() as threads:
        return list(threads.map(errors, layers))
