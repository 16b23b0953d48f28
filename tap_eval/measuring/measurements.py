"""What the images of a network say of it with given bits, each measured once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from tap_eval.images.images import Splits
from tap_eval.kept import Kept
from tap_eval.measuring.accuracy import Measurement
from tap_eval.measuring.full_precision import FullPrecision
from tap_eval.measuring.job import Job, Measures, SplitName, pieces
from tap_eval.measuring.ledger import Ledger, key
from tap_eval.measuring.measurer import Measurer
from tap_eval.quantization import finishing, quantizer
from tap_eval.quantization.integer import exact
from tap_eval.quantization.quantizer import Allocation
from tap_eval.sealed import digest

A = TypeVar("A")
B = TypeVar("B")


class Measurements:
    """Of one network and its splits; results are in the ledger under all that they depend on.

    Methods may be called from several threads.
    """

    def __init__(
        self,
        splits: Splits,
        measures: Measures,
        local: Measurer,
        ledger: Ledger,
        kept: Kept,
        *,
        network: str,
        rounded_by: Sequence[Any],
        where: Sequence[str],
        batch: int,
    ) -> None:
        """`network` is its digest, `rounded_by` what its quantized ones depend on beside it and images, `where` the
        kind of device, and `batch` the images of one pass. What is finished for one allocation is made by `local`.
        """
        self._splits = splits
        self._measures = measures
        self._local = local
        self._ledger = ledger
        self._network = network
        self._rounded_by = rounded_by
        self._where = where
        self._batch = batch
        self._full = FullPrecision(
            ledger,
            kept,
            lambda split: key("full precision", network, getattr(splits, split).digest, *where),
            self._in_full,
        )

    def of(
        self,
        allocation: Allocation | None,
        split: SplitName,
        draw: int,
        rows: np.ndarray,
        finished: bool = False,
        beside: int = 1,
    ) -> Measurement:
        """What those rows of a split say of the network with these bits, or in full precision where there are none.

        `finished` rounds it once more for this allocation. `beside` is the number of such calls that run side by side,
        this one included.
        """
        job = self._job(allocation, split, draw, rows, finished)
        images, reference = getattr(self._splits, split), self._full(split)

        def measured(piece: Job) -> Measurement:
            full = reference[torch.from_numpy(piece.rows)]
            logits = full if allocation is None else self._measures.logits(piece)
            return Measurement.of(logits, full, images.only(piece.rows).labels)

        def together() -> Measurement:
            if job.finished and allocation:  # once, and not by every worker
                self._local.finished(draw, allocation)
            return Measurement.joined(self.side_by_side(measured, self._pieces(job, beside)))

        if not len(rows):
            return Measurement(np.zeros(0, dtype=bool), np.zeros(0, dtype=np.float32))
        if allocation is None:
            return together()
        return Measurement.unpacked(self._ledger.recall(self._name(job, allocation), lambda: together().packed()))

    def holds(self, allocation: Allocation, split: SplitName, draw: int, rows: np.ndarray) -> bool:
        """Whether that was measured before, by whomever."""
        return self._ledger.holds(self._name(self._job(allocation, split, draw, rows), allocation))

    def path(self, allocation: Allocation | None) -> Literal["float", "integer", "simulated"]:
        """By which networks with such bits are measured."""
        if allocation is None:
            return "float"
        return "integer" if not self._measures.unfit and exact(allocation.most) else "simulated"

    def side_by_side(self, measure: Callable[[A], B], jobs: Sequence[A]) -> list[B]:
        """As many at a time as there are workers; those that jobs leave idle share the images of a job."""
        with ThreadPoolExecutor(self._measures.workers) as threads:
            return list(threads.map(measure, jobs))

    def _job(
        self, allocation: Allocation | None, split: SplitName, draw: int, rows: np.ndarray, finished: bool = False
    ) -> Job:
        integers = self.path(allocation) == "integer"
        sums = allocation is not None and self._measures.sums
        return Job(allocation, split, draw, rows, integers, finished and allocation is not None, sums)

    def _pieces(self, job: Job, beside: int) -> list[Job]:
        return pieces(job, self._batch, self._measures.workers // beside)

    def _in_full(self, split: SplitName) -> torch.Tensor:
        job = self._job(None, split, 0, np.arange(len(getattr(self._splits, split))))
        return torch.cat(self.side_by_side(self._measures.logits, self._pieces(job, 1)))

    def _name(self, job: Job, allocation: Allocation) -> str:
        """Of what is in the ledger of a job with bits."""
        bits = [allocation.weights, allocation.activations]
        finished = job.finished and finishing.VERSION
        how = [self.path(allocation), *self._where, *self._rounded_by, finished, *(["int8"] if job.sums else [])]
        images, calibration = getattr(self._splits, job.split).digest, self._splits.calibrations[job.draw].digest
        rows = digest(job.rows.astype("<i8").tobytes())
        return key("measured", quantizer.VERSION, how, self._network, images, calibration, bits, rows)
