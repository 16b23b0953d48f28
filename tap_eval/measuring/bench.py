"""A network with its images, ready to be measured again and again.

What is measured is measured once: results are in the ledger under the content that they
depend on (network, images, quantizer, allocation). Nothing above this module learns how an
allocation is measured.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from tap_eval.allocation.budget import Budget, check_feasible
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.allocation.size import FLOAT, Size, full_size, packed_size
from tap_eval.device import CPU, key_of
from tap_eval.images.images import Splits
from tap_eval.measuring.accuracy import Accuracy
from tap_eval.measuring.job import Job, Measures, SplitName
from tap_eval.measuring.ledger import Ledger, key
from tap_eval.measuring.measurer import Bounds, Measurer, Recipe
from tap_eval.measuring.notes import at_chance, left_in_float
from tap_eval.measuring.weights import Advance, Kept, one_thread_each, silent
from tap_eval.mistake import BudgetMistake, ImagesMistake
from tap_eval.preparing.layers import Layer
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.proxies import features
from tap_eval.proxies.features import Features, Inputs, describe, describe_task
from tap_eval.quantization import quantizer
from tap_eval.quantization.integer import exact
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork
from tap_eval.quantization.rounding import Rounding, nearest
from tap_eval.quantization.sums import NONE, SumsIn

_WATCHED, _WATCHED_LARGE = 32, 16
"""images of the search split on which the prepared network is held against the original; fewer above 64 pixels"""
_ENOUGH_FOR_CHANCE = 200  # images
A = TypeVar("A")
B = TypeVar("B")

STAGES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""parts of the search split on which candidates are compared, each holding the one before"""
ERROR_IMAGES = 512
"""Layer errors are measured on this many images of the search split, which is enough to rank layers."""


@dataclass(frozen=True)
class Task:
    """What a network is to be fitted to: the bits to choose from and the budget.

    A bench's own has the budget `beside` what stays in float32 of its network.
    """

    choices: Choices
    budget: Budget
    inputs: Inputs = "statistics"
    rounding: Rounding = "gptq"
    finish: bool = True
    """whether networks of the final table are rounded once more, each for its allocation"""
    sums: SumsIn = "int8"


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
        watched = _WATCHED if splits.search.size <= 64 else _WATCHED_LARGE
        first = splits.search.only(np.arange(min(watched, self._bounds.batch, len(splits.search)))).pixels
        self.prepared: Prepared = prepare(
            network,
            splits.calibrations[0].pixels[:2],
            [splits.calibrations[0].pixels, first],
            classes=len(splits.classes),
            output=output,
        )
        self.sums = NONE
        """values that are rounded between layers"""
        self.task = self._fitted(task, task.budget)
        self._ledger = ledger
        self._notes = notes
        outputs = self._outputs().shape[1]
        if outputs != len(splits.classes):
            raise ImagesMistake(
                f"{splits.name} has {len(splits.classes)} classes, {name} tells {outputs} apart: "
                "give images of the network's task, or the names of all its classes in --classes FILE."
            )
        highest = uniform(self.layers, max(task.choices.weights), max(task.choices.activations))
        kept = Kept(ledger.path.parent / "weights")
        self._where = key_of(device)
        content = " ".join([self.digest, *self._where])
        recipe = Recipe(task.rounding, task.choices.weights, content, kept, task.sums)
        self._local = Measurer(self.prepared, splits, highest, self._bounds, recipe, advance, device)
        self._measures = spread(self._local)
        self.sums = self._local.between
        self.task = self._fitted(task, task.budget)

    def beside(self, budget: Budget) -> Budget:
        """`budget` as it is of this network, whose rest in float32 counts within bytes, as do scales of sums."""
        return budget.beside(FLOAT * self.prepared.left, self.sums)

    def _fitted(self, task: Task, budget: Budget) -> Task:
        """`task` with another budget, beside what stays in float32; raises `BudgetMistake` when it cannot be met."""
        budget = self.beside(budget)
        try:
            check_feasible(self.layers, task.choices, budget)
        except BudgetMistake as mistake:
            raise BudgetMistake(f"{self.name}: {mistake}") from mistake
        return replace(task, budget=budget)

    def at(self, budget: Budget) -> Bench:
        """The same network to be fitted to another budget; raises `BudgetMistake` when that cannot be met.

        Nothing is opened, calibrated or computed again: what this one has computed is shared, and what either of them
        measures from then on is in the ledger.
        """
        self.digest  # noqa: B018 it takes a pass, and every look into the ledger needs it
        other = copy.copy(self)
        other.task = self._fitted(self.task, budget)
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
        content = hashlib.sha256()
        folded = {layer.name: module.weight for layer, module in zip(self.layers, self.prepared.modules, strict=True)}
        for name, tensor in (*folded.items(), *self.prepared.network.state_dict().items()):
            content.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            content.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return content.hexdigest()[:32]

    @cached_property
    def digest(self) -> str:
        """Names the network: its structure and weights, BatchNorm folded, and what its code makes of images."""
        content = hashlib.sha256(str(self.prepared.network).encode())
        for layer, module in zip(self.layers, self.prepared.modules, strict=True):
            content.update(f"{layer}{module}".encode())
            content.update(module.weight.numpy().tobytes())
        for name, tensor in self.prepared.network.state_dict().items():
            content.update(name.encode())
            content.update(tensor.contiguous().numpy().tobytes())
        outputs = self._outputs()
        least, greatest = outputs.min(1), outputs.max(1)
        rounded = [f"{value:.3g}" for value in torch.cat([least.values, greatest.values]).tolist()]
        content.update(json.dumps([rounded, least.indices.tolist(), greatest.indices.tolist()]).encode())
        return content.hexdigest()[:32]

    @torch.inference_mode()
    def _outputs(self) -> torch.Tensor:
        """(N, classes), of the calibration images in full precision."""
        return self.prepared(self.splits.calibrations[0].pixels)

    @cached_property
    def features(self) -> list[Features]:
        """What a proxy gets as `layers`; computed once a network, calibration images and contract."""
        calibration, inputs = self.splits.calibrations[0], self.task.inputs
        name = key("features", features.VERSION, self.digest, calibration.digest, inputs)
        return self._ledger.recall(name, lambda: describe(self.prepared, calibration, inputs, self._bounds.features))

    @cached_property
    def described_task(self) -> Features:
        """What a proxy gets as `task`."""
        return describe_task(
            self.layers,
            self.splits.search.size,
            self.splits.name,
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
            *(f"{self.name}: {note}" for note in at_chance(self._first(), self.splits.search.labels)),
            *(f"{self.name} is measured {note}" for note in self._measures.notes),
        ]

    def _first(self) -> Accuracy:
        """In full precision on the first stages of the search split, as many images as tell it from chance."""
        correct = np.zeros(0, dtype=bool)
        for stage in range(len(self.stages)):
            if len(correct) < _ENOUGH_FOR_CHANCE:
                correct = np.concatenate([correct, self.correct(None, stage)])
        return Accuracy(int(correct.sum()), len(correct))

    @cached_property
    def stages(self) -> list[np.ndarray]:
        """The rows of the search split that each stage adds, in an order that does not follow the source's.

        One part for each of `STAGES`, some of them empty where there are few images.
        """
        rows = np.random.default_rng(0).permutation(len(self.splits.search))
        bounds = [math.ceil(share * len(rows)) for share in STAGES]
        return [np.sort(part) for part in np.split(rows, bounds[:-1])]

    def correct(self, allocation: Allocation | None, stage: int, beside: int = 1) -> np.ndarray:
        """Which images of a stage of the search split are classified correctly, bool; measured once.

        `beside` is the number of such calls that run side by side, this one included.
        """
        return self._correct(self._job(allocation, "search", 0, self.stages[stage]), f"stage {stage}", beside)

    def correct_all(self, allocations: Sequence[Allocation], stage: int) -> list[np.ndarray]:
        """`correct` for each allocation, as many side by side as there are workers."""
        count = len(allocations)
        return self._side_by_side(lambda allocation: self.correct(allocation, stage, count), allocations)

    def measure(
        self,
        allocation: Allocation | None,
        split: SplitName = "search",
        draw: int = 0,
        beside: int = 1,
        finished: bool = False,
    ) -> Accuracy:
        """Top-1 on a split with the bits of `allocation`, or in full precision; measured once.

        `finished` rounds the network once more for this allocation. `beside` as above.
        """
        if split == "search" and draw == 0 and not finished:
            correct = np.concatenate([self.correct(allocation, stage, beside) for stage in range(len(self.stages))])
        else:
            rows = np.arange(len(getattr(self.splits, split)))
            correct = self._correct(self._job(allocation, split, draw, rows, finished), "all", beside)
        return Accuracy(int(correct.sum()), len(correct))

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
        finished: bool = False,
        advance: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Top-1 (draws, allocations) on a split, as many side by side as there are workers.

        `advance` is called after each of them, by several threads.
        """
        if finished:
            self.finish(allocations, draws)
        pairs = list(itertools.product(draws, allocations))

        def measured(pair: tuple[int, Allocation]) -> float:
            top1 = self.measure(pair[1], split, pair[0], len(pairs), finished).top1
            advance()
            return top1

        return np.array(self._side_by_side(measured, pairs)).reshape(len(draws), len(allocations))

    def _side_by_side(self, measure: Callable[[A], B], jobs: Sequence[A]) -> list[B]:
        """As many at a time as there are workers; those that jobs leave idle share the images of a job."""
        with ThreadPoolExecutor(self._measures.workers) as threads:
            return list(threads.map(measure, jobs))

    def _job(
        self, allocation: Allocation | None, split: SplitName, draw: int, rows: np.ndarray, finished: bool = False
    ) -> Job:
        integers = self._path(allocation) == "integer"
        sums = allocation is not None and self.rounds_sums
        return Job(allocation, split, draw, rows, integers, finished and allocation is not None, sums)

    def _path(self, allocation: Allocation | None) -> Literal["float", "integer", "simulated"]:
        if allocation is None:
            return "float"
        return "integer" if not self.unfit and exact(allocation.most) else "simulated"

    def measured_on(self, allocation: Allocation) -> dict[str, str]:
        """By which `path` allocations like this are measured, and on what kind of `device`: floats differ by them."""
        return {"path": self._path(allocation), "device": (self._where or [CPU.type])[0]}

    def _shared(self, job: Job, beside: int) -> np.ndarray:
        """The job in as many pieces as keep all workers busy, cut between batches: the same floats in any number."""
        if job.finished and job.allocation:  # once, and not by every worker
            self._local.finished(job.draw, job.allocation)
        size = self._bounds.batch
        batches = [job.rows[start : start + size] for start in range(0, len(job.rows), size)]
        pieces = np.array_split(np.arange(len(batches)), min(max(self._measures.workers // beside, 1), len(batches)))
        jobs = [replace(job, rows=np.concatenate([batches[place] for place in piece])) for piece in pieces]
        return np.concatenate(self._side_by_side(self._measures.correct, jobs))

    def _correct(self, job: Job, part: str, beside: int) -> np.ndarray:
        allocation, images = job.allocation, getattr(self.splits, job.split)
        calibration = "" if allocation is None else self.splits.calibrations[job.draw].digest
        bits = None if allocation is None else [allocation.weights, allocation.activations]
        if not len(job.rows):
            return np.zeros(0, dtype=bool)
        how = [self._path(allocation), *self._where, *([] if allocation is None else [*self._rounding, job.finished])]
        how += ["int8"] if job.sums else []
        name = key("correct", quantizer.VERSION, how, self.digest, images.digest, calibration, bits, part)
        text = self._ledger.recall(name, lambda: np.packbits(self._shared(job, beside)).tobytes().hex())
        return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=len(job.rows)).astype(bool)

    @property
    def _rounding(self) -> list[Any]:
        """What rounded weights depend on beside network and images."""
        return [self.task.rounding, self.task.choices.weights, self._bounds.moments]

    @cached_property
    def weight_errors(self) -> list[dict[int, float]]:
        """||Q_b(W) - W||^2 of each layer, rounded to the nearest, by the bits `b` to choose from."""
        choices = self.task.choices.weights
        name = key("weight errors", quantizer.VERSION, self.digest, choices)
        found = self._ledger.recall(name, lambda: _rounding_errors(self.prepared.modules, choices))
        return [dict(zip(choices, errors, strict=True)) for errors in found]

    @cached_property
    def layer_errors(self) -> list[float]:
        """Mean KL divergence (nats) of the output when one layer alone has the lowest weight bits.

        Everything else stays in full precision; on the first `ERROR_IMAGES` images of the
        search split, without labels. Measured once a network, bits and draw.
        """
        lowest, count = min(self.task.choices.weights), min(ERROR_IMAGES, len(self.splits.search))
        images = [self.splits.search.digest, count, self.splits.calibrations[0].digest]
        name = key("layer errors", quantizer.VERSION, self._rounding, self.digest, images, lowest, *self._where)
        return self._ledger.recall(name, lambda: self._measures.layer_errors(lowest, count))


def _rounding_errors(layers: Sequence[Quantizable], choices: Sequence[int]) -> list[list[float]]:
    @torch.no_grad()
    def errors(layer: Quantizable) -> list[float]:
        weight = layer.weight
        return [float((nearest(weight, bits).real() - weight).double().square().sum()) for bits in choices]

    with one_thread_each() as threads:
        return list(threads.map(errors, layers))
