"""Measuring the allocations of one network in this process: integers where they fit, else the simulated path."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch

from tap_eval.images.images import Images, Splits
from tap_eval.measuring.layer_errors import layer_errors, layer_errors_one_by_one
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.program import Program, record
from tap_eval.quantization import quantizer
from tap_eval.quantization.agreement import NOISE, multiplied_otherwise, recorded_otherwise
from tap_eval.quantization.integer import IntegerNetwork, KeptWeights, Unfit
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork

SplitName = Literal["search", "test"]
_NETWORKS_KEPT = 4
"""rewritten for as many draws or activation bits; the weights in use are theirs"""
_AT_ONCE = 5000
"""images whose logits are held together"""


@dataclass(frozen=True)
class Job:
    """Some images of a split, to be classified with the bits of `allocation`, or in full precision."""

    allocation: Allocation | None
    split: SplitName
    draw: int
    """of the calibration images"""
    rows: np.ndarray
    integers: bool
    """multiplied as such, or else simulated"""


class Measures(Protocol):
    """Whatever measures: this process, or several machines."""

    @property
    def workers(self) -> int:
        """Jobs that run side by side."""
        ...

    @property
    def unfit(self) -> str | None:
        """Why allocations are measured on the simulated path, or None where integers are multiplied."""
        ...

    @property
    def notes(self) -> list[str]:
        """How measuring differs from what is usual, each after "is measured"."""
        ...

    def correct(self, job: Job) -> np.ndarray:
        """Which of the job's images are classified correctly, bool."""
        ...

    def layer_errors(self, bits: int, count: int) -> list[float]:
        """Mean KL divergence (nats) a layer with `bits` of its own, on the first `count` search images."""
        ...


class Measurer:
    """One network and its images in memory. Methods may be called from several threads; they take turns."""

    workers = 1

    def __init__(self, prepared: Prepared, splits: Splits, highest: Allocation, batch: int, memory: int) -> None:
        """`highest` is the allocation on which both paths are compared; `memory` bounds packed weights, in bytes."""
        self.prepared = prepared
        self._splits = splits
        self._highest = highest
        self._asked = self._batch = batch
        self._memory = memory
        self._lock = threading.RLock()
        self._networks: dict[int, QuantizedNetwork] = {}
        self._integer_networks: OrderedDict[tuple[int, tuple[int, ...]], IntegerNetwork] = OrderedDict()
        self._kept = KeptWeights(memory)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process makes everything else anew."""
        return Measurer, (self.prepared, self._splits, self._highest, self._asked, self._memory)

    def network(self, draw: int) -> QuantizedNetwork:
        """The network calibrated on draw `draw`, with every (layer, bits) it has met kept."""
        if draw not in self._networks:
            seen = quantizer.calibrate(self.prepared, self._splits.calibrations[draw].pixels)
            self._networks[draw] = QuantizedNetwork(self.prepared, seen, self._integers)
        return self._networks[draw]

    @cached_property
    def _integers(self) -> list[quantizer.Integers]:
        return [quantizer.integers_of(module) for module in self.prepared.modules]

    @cached_property
    def _program(self) -> Program:
        """The steps of the network; raises `Unfit` when they cannot be recorded."""
        image = self._splits.calibrations[0].pixels[:1]
        try:
            program = record(self.prepared, image.expand(self.prepared.batch, *image.shape[1:]).contiguous())
            images = program.padded(self._splits.calibrations[0].pixels[: program.batch])
            place = recorded_otherwise(self.prepared, program, images)
        except Exception as error:  # the network's code under a tracer: whatever it raises, it cannot be recorded
            raise Unfit(f"its steps cannot be recorded ({type(error).__name__}: {error})") from error
        if place:
            raise Unfit(f"its steps, as they were recorded, compute something else than the network, first in {place}")
        return program

    @cached_property
    def _layout(self) -> torch.memory_format:
        """Channels last, as the integer path has them, unless the network's code takes another order for granted."""
        images = self._splits.calibrations[0].pixels[: self.prepared.batch]
        try:
            with torch.inference_mode():
                expected = self.prepared(images)
                got = self.prepared(images.contiguous(memory_format=torch.channels_last))
        except RuntimeError:  # it calls `view`
            return torch.contiguous_format
        same = torch.allclose(got, expected, rtol=0, atol=NOISE * float(expected.abs().max()))
        return torch.channels_last if same else torch.contiguous_format

    @cached_property
    def unfit(self) -> str | None:
        """See `Measures.unfit`."""
        pixels = self._splits.calibrations[0].pixels
        with self._lock:
            try:
                network, fast = self.network(0), self._integer_network(0, self._highest)
                network.choose(self._highest)
                images = self._program.padded(pixels[: self._program.batch])
                place = multiplied_otherwise(fast, self._program, network, images)
            except Unfit as reason:
                return str(reason)
            except RuntimeError as error:  # an operator that this build or this CPU does not have
                return f"integers cannot be multiplied here ({error})"
        return place and f"integers give something else than the simulated path does, first in {place}"

    @property
    def notes(self) -> list[str]:
        """See `Measures.notes`."""
        notes = [f"without integers: {self.unfit}"] if self.unfit else []
        if self._batch < self._asked:
            notes.append(f"in batches of {self._batch}, since {self._asked} images did not fit the memory")
        return notes

    def correct(self, job: Job) -> np.ndarray:
        """See `Measures.correct`."""
        images: Images = getattr(self._splits, job.split)
        if job.integers and self.unfit:
            raise RuntimeError(f"this worker cannot measure as the others do: {self.unfit}")
        correct = np.zeros(len(job.rows), dtype=bool)
        with self._lock:
            for start in range(0, len(job.rows), _AT_ONCE):
                part = images.only(job.rows[start : start + _AT_ONCE])
                if job.allocation is not None and job.integers:
                    logits = self._integer_network(job.draw, job.allocation).logits(part)
                else:
                    logits = self._simulated(job.allocation, part, job.draw)
                correct[start : start + len(part)] = (logits.argmax(1) == part.labels).numpy()
        return correct

    def layer_errors(self, bits: int, count: int) -> list[float]:
        """See `Measures.layer_errors`."""
        pixels = self._splits.search.only(np.arange(count))
        with self._lock:
            try:
                table = layer_errors(self.network(0), self._program, pixels, [bits])
            except Unfit:
                table = layer_errors_one_by_one(self.network(0), pixels, self._batch, [bits])
        return [error for (error,) in table]

    def _simulated(self, allocation: Allocation | None, pixels: torch.Tensor | Images, draw: int) -> torch.Tensor:
        network = self.network(draw)
        network.choose(allocation)
        while True:
            try:
                parts = (part.contiguous(memory_format=self._layout) for part in pixels.split(self._batch))
                return torch.cat([network.logits(part, self._batch) for part in parts])
            except RuntimeError as error:
                memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
                if not memory or self._batch == 1:
                    raise
                self._batch //= 2

    def _integer_network(self, draw: int, allocation: Allocation) -> IntegerNetwork:
        """The integer network for the activation bits of `allocation`, with its weight bits chosen."""
        place = (draw, allocation.activations)
        network = self._integer_networks.pop(place, None) or IntegerNetwork(
            self.network(draw), self._program, allocation.activations, self._kept
        )
        self._integer_networks[place] = network
        if len(self._integer_networks) > _NETWORKS_KEPT:
            self._integer_networks.popitem(last=False)
        network.choose(allocation)
        return network
