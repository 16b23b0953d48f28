"""A network with its images, ready to be measured again and again.

What is measured is measured once: results are in the ledger under the content that they
depend on (network, images, quantizer, allocation). Nothing above this module learns how an
allocation is measured.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import uniform
from tap_eval.allocation.size import FLOAT, Size, full_size, packed_size
from tap_eval.device import CPU, key_of
from tap_eval.images.images import Splits
from tap_eval.kept import Kept
from tap_eval.measuring.accuracy import Accuracy, Measurement
from tap_eval.measuring.digest import of_network, of_weights
from tap_eval.measuring.job import Measures, SplitName
from tap_eval.measuring.layer_errors import enough
from tap_eval.measuring.ledger import Ledger, Timed, key
from tap_eval.measuring.measurements import Measurements
from tap_eval.measuring.measurer import Measurer
from tap_eval.measuring.notes import at_chance, left_in_float
from tap_eval.measuring.progress import Advance, silent
from tap_eval.measuring.recipe import Bounds, Recipe
from tap_eval.measuring.rounded import rounding_errors
from tap_eval.measuring.stages import STAGES, stages, watched
from tap_eval.measuring.task import Task
from tap_eval.mistake import ImagesMistake
from tap_eval.preparing.layers import Layer
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared, attending
from tap_eval.proxies import features
from tap_eval.proxies.features import Features, describe, describe_task
from tap_eval.proxies.fitness import Foretelling
from tap_eval.quantization import quantizer
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork
from tap_eval.quantization.sums import NONE

A = TypeVar("A")


class Bench:
    """One network of the benchmark set. Methods may be called from several threads."""

    def __init__(
        self,
        name: str,
        network: torch.nn.Module,
        splits: Splits,
        task: Task,
        ledger: Ledger,
        bounds: Bounds | None = None,
        *,
        spread: Callable[[Measurer], Measures] = lambda measurer: measurer,
        output: str | None = None,
        notes: Sequence[str] = (),
        advance: Advance = silent,
        device: torch.device = CPU,
    ) -> None:
        """`spread` brings measuring from `device` to others, or to other machines; `output` names the logits among what
        the network returns; `notes` say how the network came about; `advance` is told of what takes long.

        Raises a `Mistake` when images and network do not fit, or the budget cannot be met.
        """
        self.name = name
        self.splits = splits
        self._bounds = bounds or Bounds()
        calibration = splits.calibrations[0].pixels
        prepared = prepare(
            network,
            calibration[:2],
            [calibration, watched(splits.search, self._bounds.batch)],
            classes=len(splits.classes),
            output=output,
        )
        self.prepared: Prepared = attending(prepared) if task.attention == "8" else prepared
        self.foretelling: Foretelling | None = None
        """by which scores are judged where no allocation is to be measured for them"""
        self.sums = NONE
        """values that are rounded between layers"""
        self.task = task
        self.task = self._fitted(task.budget)
        self._ledger = ledger
        self._notes = notes
        outputs = self._outputs().shape[1]
        if outputs != len(splits.classes):
            of_some = ", or the names of all its classes in --classes FILE" if outputs > len(splits.classes) else ""
            raise ImagesMistake(
                f"{splits.name} has {len(splits.classes)} classes, {name} tells {outputs} apart: "
                f"give images of the network's task{of_some}."
            )
        highest = uniform(self.layers, max(task.choices.weights), max(task.choices.activations))
        kept = Kept(ledger.path.parent / "weights")
        self.device = device
        self._where = key_of(device)
        content = " ".join([self.digest, *self._where])
        recipe = Recipe(task.rounding, task.choices.weights, content, kept, task.sums, task.ranges)
        self.activations = recipe.activations(self.prepared)
        """how ranges of activations are chosen and what of attention is in integers, where not as usual"""
        self._local = Measurer(self.prepared, splits, highest, self._bounds, recipe, advance, device)
        self._measures = spread(self._local)
        self._measured = Measurements(
            splits,
            self._measures,
            self._local,
            ledger,
            kept,
            network=self.digest,
            rounded_by=self.rounded_by,
            where=self._where,
            batch=self._bounds.batch,
        )
        self.sums = self._local.between
        self.task = self._fitted(task.budget)

    def beside(self, budget: Budget) -> Budget:
        """`budget` as it is of this network, whose rest in float32 counts within bytes, as do scales of sums."""
        return budget.beside(FLOAT * self.prepared.left, self.sums, self.task.latencies)

    def _fitted(self, budget: Budget) -> Task:
        return self.task.fitted(self.beside(budget), self.layers, self.name)

    def at(self, budget: Budget, name: str | None = None) -> Bench:
        """The same network to be fitted to another budget, under a `name` of its own where one is given.

        Raises `BudgetMistake` when the budget cannot be met.
        Nothing is opened, calibrated or computed again: what this one has computed is shared, and what either of them
        measures from then on is in the ledger.
        """
        self.digest  # noqa: B018 it takes a pass, and every look into the ledger needs it
        other = copy.copy(self)
        other.task = self._fitted(budget)
        other.name = name or self.name
        vars(other).pop("described_task", None)
        return other

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The quantizable layers, in the order in which they run."""
        return self.prepared.layers

    def size(self, allocation: Allocation | None) -> Size:
        """Bytes of the whole network, packed with the bits of `allocation`, or in full precision."""
        if allocation is None:
            return full_size(self.prepared)
        return packed_size(self.layers, allocation, FLOAT * self.prepared.left, self.sums)

    @cached_property
    def weights_digest(self) -> str:
        """Names the tensors of the network by their names and values, BatchNorm folded; the same on every machine."""
        return of_weights(self.prepared)

    @cached_property
    def digest(self) -> str:
        """Names the network: its structure and weights, BatchNorm folded, and what its code makes of images."""
        return of_network(self.prepared, self._outputs())

    @torch.inference_mode()
    def _outputs(self) -> torch.Tensor:
        """(N, classes), of the calibration images in full precision."""
        return self.prepared(self.splits.calibrations[0].pixels)

    @cached_property
    def features(self) -> list[Features]:
        """What a proxy gets as `layers`; computed once a network, images, contract and bits."""
        bound, inputs, bits = self._bounds.features, self.task.inputs, self.task.choices.weights
        images = [self.splits.calibrations[0].digest, self.splits.search.digest]
        name = key("features", features.VERSION, bound, self.digest, images, inputs, bits)
        return self._ledger.recall(name, self._described)

    def _described(self) -> list[Features]:
        bound, inputs, bits = self._bounds.features, self.task.inputs, self.task.choices.weights
        return describe(self.prepared, self.splits.calibrations[0], inputs, bound, bits)

    @property
    def describing_seconds(self) -> float:
        """What `features` take, whatever is kept of them."""
        what = ["describing", features.VERSION, self._bounds.features, self.task.inputs, self.task.choices.weights]
        return self.once(what, lambda: bool(self._described())).seconds

    @property
    def rounding_seconds(self) -> float:
        """What calibrating takes, and rounding all layers at all bits to choose from, whatever is kept of them."""
        what = ["rounding", quantizer.VERSION, *self.rounded_by, self.rounds_sums]
        return self.once(what, lambda: self._local.anew().round()).seconds

    @cached_property
    def described_task(self) -> Features:
        """What a proxy gets as `task`."""
        return describe_task(
            self.layers,
            self.splits.search.size,
            self.splits.data,
            len(self.splits.classes),
            self.task.choices,
            self.task.budget,
        )

    @property
    def rounds_sums(self) -> bool:
        """Whether what travels between layers is in integers, where `tap_eval.quantization.sums` says so."""
        return self._measures.sums

    @property
    def unfit(self) -> str | None:
        """Why allocations are measured on the simulated path, or None where integers are multiplied."""
        return self._measures.unfit

    @property
    def notes(self) -> list[str]:
        """What a user should know: of the images, of the network, and how measuring differs from what is usual."""
        return [
            *self._notes,
            *self.splits.notes,
            *(f"{self.name}: {note}" for note in (*self.prepared.notes, *left_in_float(self.prepared))),
            *(f"{self.name}: {note}" for note in at_chance(self.measure(None), self.splits.search.labels)),
            *(f"{self.name} is measured {note}" for note in self._measures.notes),
        ]

    @cached_property
    def stages(self) -> list[np.ndarray]:
        """The rows of the search split that each stage adds, and the rest."""
        return stages(len(self.splits.search))

    def seen(self, allocation: Allocation | None, stage: int, beside: int = 1) -> Measurement:
        """What the images of a stage of the search split say of a network; measured once.

        `beside` is the number of such calls that run side by side, this one included.
        """
        return self._measured.of(allocation, "search", 0, self.stages[stage], beside=beside)

    def was_seen(self, allocation: Allocation) -> bool:
        """Whether the images of the first stage were asked before, by whomever."""
        return self._measured.holds(allocation, "search", 0, self.stages[0])

    def seen_all(self, allocations: Sequence[Allocation], stage: int) -> list[Measurement]:
        """`seen` for each allocation, as many side by side as there are workers."""
        count = len(allocations)
        return self._measured.side_by_side(lambda allocation: self.seen(allocation, stage, count), allocations)

    @property
    def compared(self) -> int:
        """How many search images candidates are compared on."""
        return sum(map(len, self.stages[: len(STAGES)]))

    def searched(self, allocation: Allocation | None) -> Accuracy:
        """On all images that candidates are compared on; measured once."""
        return Measurement.joined([self.seen(allocation, stage) for stage in range(len(STAGES))]).accuracy

    def held_out(self, allocation: Allocation, draw: int) -> Measurement:
        """What those search images say of the network that is kept that candidates are not compared on, under a draw.

        Measured once. Where there are no such images, all of the split speak.
        """
        rows = self.stages[-1] if len(self.stages[-1]) else np.arange(len(self.splits.search))
        return self._measured.of(allocation, "search", draw, rows, self.keeps_finished(allocation))

    def measure(
        self,
        allocation: Allocation | None,
        split: SplitName = "search",
        draw: int = 0,
        beside: int = 1,
        finished: bool = False,
    ) -> Accuracy:
        """Top-1 on a split with the bits of `allocation`, or in full precision, and how far outputs are from that.

        `finished` rounds the network once more for this allocation. `beside` as above. Measured once.
        """
        if split == "search" and draw == 0 and not finished:
            parts = [self.seen(allocation, stage, beside) for stage in range(len(self.stages))]
            return Measurement.joined(parts).accuracy
        rows = np.arange(len(getattr(self.splits, split)))
        return self._measured.of(allocation, split, draw, rows, finished, beside).accuracy

    def keeps_finished(self, allocation: Allocation, beside: int = 1) -> bool:
        """Whether the network with these bits that is kept is the finished one.

        Where finishing is asked for, unless it takes outputs on the search images further from full precision under the
        first draw, by more than a standard error. No label is looked at.
        """
        if not self.task.finish:
            return False
        plain = Measurement.joined([self.seen(allocation, stage, beside) for stage in range(len(self.stages))])
        finished = self._measured.of(allocation, "search", 0, np.arange(len(plain)), True, beside)
        further = finished.kl[np.concatenate(self.stages)].astype(float) - plain.kl
        return bool(further.mean() <= further.std() / math.sqrt(len(further)))

    def quantized(self, allocation: Allocation, draw: int = 0, finished: bool = True) -> QuantizedNetwork:
        """The network that is measured with the bits of `allocation`: its integers, scales, biases and inputs."""
        return self._local.quantized(draw, allocation, finished)

    def finish(self, allocations: Sequence[Allocation], draws: Sequence[int]) -> None:
        """Rounds the network once more for each of them, as many side by side as there are threads, and keeps that."""
        for draw in draws:
            self._local.finish(draw, allocations)

    def measure_all(
        self,
        allocations: Sequence[Allocation],
        split: SplitName,
        draws: Sequence[int],
        kept: bool = False,
        advance: Callable[[], None] = lambda: None,
    ) -> list[list[Accuracy]]:
        """`measure` on a split, a row a draw, a column an allocation, as many side by side as there are workers.

        Of networks rounded a layer at a time, or `kept` as `keeps_finished` says. `advance` is called after each of
        them, by several threads.
        """
        if kept and self.task.finish:
            self.finish(allocations, draws)
        pairs = list(itertools.product(draws, allocations))

        def measured(pair: tuple[int, Allocation]) -> Accuracy:
            draw, allocation = pair
            finished = kept and self.keeps_finished(allocation, len(pairs))
            found = self.measure(allocation, split, draw, len(pairs), finished)
            advance()
            return found

        found, columns = self._measured.side_by_side(measured, pairs), len(allocations)
        return [found[start : start + columns] for start in range(0, len(found), columns)]

    def measured_on(self, allocation: Allocation) -> dict[str, str]:
        """By which `path` allocations like this are measured, and on what kind of `device`: floats differ by them."""
        return {"path": self._measured.path(allocation), "device": (self._where or [CPU.type])[0]}

    @property
    def rounded_by(self) -> list[Any]:
        """What a quantized network depends on beside network and images."""
        return [self.task.rounding, self.task.choices.weights, self._bounds.moments, *self.activations]

    @cached_property
    def weight_errors(self) -> list[dict[int, float]]:
        """||Q_b(W) - W||^2 of each layer, rounded to the nearest, by the bits `b` to choose from."""
        choices = self.task.choices.weights
        name = key("weight errors", quantizer.VERSION, self.digest, choices)
        found = self._ledger.recall(name, lambda: rounding_errors(self.prepared.modules, choices))
        return [dict(zip(choices, errors, strict=True)) for errors in found]

    @cached_property
    def layer_errors(self) -> list[float]:
        """Mean KL divergence (nats) of the output when one layer alone has the lowest weight bits.

        Everything else stays in full precision; on as many of the first search images as `enough` says, without
        labels. Measured once a network, bits and draw.
        """
        return self.layer_errors_at(min(self.task.choices.weights)).value

    def layer_errors_at(self, bits: int) -> Timed[list[float]]:
        """`layer_errors` with other bits, and what that took once layers were rounded."""
        search, calibration = self.splits.search, self.splits.calibrations[0]
        images = [search.digest, count := enough(search), calibration.digest]
        name = key("layer errors", quantizer.VERSION, self.rounded_by, self.digest, images, bits, *self._where)
        return self._ledger.timed(name, lambda: self._measures.layer_errors(bits, count), self._local.round)

    def once(self, what: Sequence[object], compute: Callable[[], A], rounded: bool = False) -> Timed[A]:
        """JSON that follows from the network, the first draw of calibration images and `what`; computed once.

        Where layers are to be `rounded` for it, its seconds begin after that, which others pay for too.
        """
        name = key("once", *what, self.digest, self.splits.calibrations[0].digest, *self._where)
        return self._ledger.timed(name, compute, self._local.round if rounded else lambda: None)
