"""A network with its images, ready to be measured again and again.

What is measured is measured once: results are in the ledger under the content that they
depend on (network, images, quantizer, allocation). Nothing above this module learns how an
allocation is measured.
"""

from __future__ import annotations

import hashlib
import math
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from tap_eval import quantizer, sweep
from tap_eval.accuracy import Accuracy
from tap_eval.allocation import Budget, Choices, check_feasible, uniform
from tap_eval.features import Features, Inputs, describe, describe_task
from tap_eval.images import Images, Splits
from tap_eval.integer import IntegerNetwork, Unfit
from tap_eval.layers import Layer, Prepared, prepare
from tap_eval.ledger import Ledger, key
from tap_eval.mistake import ImagesMistake
from tap_eval.program import Program, record
from tap_eval.quantizer import Allocation, QuantizedNetwork

SplitName = Literal["search", "test"]
STAGES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""parts of the search split on which candidates are compared, each holding the one before"""
ERROR_IMAGES = 512
"""Layer errors are measured on this many images of the search split, which is enough to rank layers."""


@dataclass(frozen=True)
class Task:
    """What a network is to be fitted to: the bits to choose from and the budget."""

    choices: Choices
    budget: Budget
    inputs: Inputs = "statistics"


class Bench:
    """One network of the benchmark set. Methods may be called from several threads."""

    def __init__(
        self, name: str, network: torch.nn.Module, splits: Splits, task: Task, ledger: Ledger, batch: int = 125,
        memory: int = 2**30,
    ) -> None:  # fmt: skip
        """`memory` bounds the packed weights that are kept, in bytes.

        Raises a `Mistake` when images and network do not fit, or the budget cannot be met.
        """
        self.name = name
        self.splits = splits
        self.task = task
        self.prepared: Prepared = prepare(network, splits.search.pixels[:2])
        check_feasible(self.layers, task.choices, task.budget)
        self._ledger = ledger
        self._batch = batch
        self._memory = memory
        self._lock = threading.RLock()
        self._networks: dict[int, QuantizedNetwork] = {}
        self._integer_networks: dict[tuple[int, tuple[int, ...]], IntegerNetwork] = {}
        outputs = self.network(0).logits(splits.search.pixels[:2], 2).shape[1]
        if outputs != len(splits.classes):
            raise ImagesMistake(
                f"{splits.name} has {len(splits.classes)} classes, {name} tells {outputs} apart: "
                "give images of the network's task."
            )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The quantizable layers, in the order in which they run."""
        return self.prepared.layers

    @cached_property
    def digest(self) -> str:
        """Names the network: its structure and weights, BatchNorm folded, and what its code makes of images."""
        content = hashlib.sha256(str(self.prepared.network).encode())
        for name, tensor in self.prepared.network.state_dict().items():
            content.update(name.encode())
            content.update(tensor.contiguous().numpy().tobytes())
        content.update(" ".join(f"{value:.3g}" for value in self._outputs()).encode())
        return content.hexdigest()[:32]

    @torch.inference_mode()
    def _outputs(self) -> list[float]:
        """Least and greatest full-precision output on each calibration image, and where they are."""
        logits = self.prepared.network(self.splits.calibrations[0].pixels)
        least, greatest = logits.min(1), logits.max(1)
        return torch.cat([least.values, greatest.values, least.indices, greatest.indices]).tolist()

    @cached_property
    def features(self) -> list[Features]:
        """What a proxy gets as `layers`."""
        return describe(self.prepared, self.splits.calibrations[0], self.task.inputs)

    @cached_property
    def described_task(self) -> Features:
        """What a proxy gets as `task`."""
        return describe_task(
            self.layers,
            self.splits.search,
            self.splits.name,
            len(self.splits.classes),
            self.task.choices,
            self.task.budget,
        )

    def network(self, draw: int) -> QuantizedNetwork:
        """The network calibrated on draw `draw`, with every (layer, bits) it has met kept."""
        if draw not in self._networks:
            seen = quantizer.calibrate(self.prepared, self.splits.calibrations[draw].pixels)
            self._networks[draw] = QuantizedNetwork(self.prepared, seen, self._integers)
        return self._networks[draw]

    @cached_property
    def _integers(self) -> list[quantizer.Integers]:
        return [quantizer.integers_of(self.prepared.module(layer)) for layer in self.layers]

    @cached_property
    def _program(self) -> Program:
        """The steps of the network; raises `Unfit` when they cannot be recorded."""
        image = self.splits.calibrations[0].pixels[:1]
        try:
            return record(self.prepared, image.expand(self.prepared.batch, *image.shape[1:]).contiguous())
        except Exception as error:  # the network's code under a tracer: whatever it raises, it cannot be recorded
            raise Unfit(f"its steps cannot be recorded ({type(error).__name__}: {error})") from error

    @cached_property
    def unfit(self) -> str | None:
        """Why allocations are measured on the simulated path, or None where integers are multiplied."""
        top, most = max(self.task.choices.weights), max(self.task.choices.activations)
        allocation = uniform(self.layers, top, most)
        pixels = self.splits.calibrations[0].pixels
        try:
            got = self._integer_network(0, allocation).logits(pixels)
        except Unfit as reason:
            return str(reason)
        network = self.network(0)
        network.choose(allocation)
        expected = network.logits(pixels, self._batch)
        if not torch.allclose(got, expected, rtol=0, atol=1e-3 * float(expected.abs().max())):
            return "the integer path gives other outputs than the simulated one"
        return None

    def _integer_network(self, draw: int, allocation: Allocation) -> IntegerNetwork:
        """The integer network for the activation bits of `allocation`, with its weight bits chosen."""
        place = (draw, allocation.activations)
        if place not in self._integer_networks:
            self._integer_networks[place] = IntegerNetwork(
                self.network(draw), self._program, allocation.activations, self._memory
            )
        self._integer_networks[place].choose(allocation)
        return self._integer_networks[place]

    def _logits(self, allocation: Allocation | None, pixels: torch.Tensor, draw: int) -> torch.Tensor:
        if allocation is not None and self.unfit is None:
            return self._integer_network(draw, allocation).logits(pixels)
        network = self.network(draw)
        network.choose(allocation)
        return network.logits(pixels, self._batch)

    @cached_property
    def stages(self) -> list[np.ndarray]:
        """The rows of the search split that each stage adds, in an order that does not follow the source's."""
        rows = np.random.default_rng(0).permutation(len(self.splits.search))
        bounds = sorted({math.ceil(share * len(rows)) for share in STAGES})
        return [np.sort(part) for part in np.split(rows, bounds[:-1])]

    def correct(self, allocation: Allocation | None, stage: int) -> np.ndarray:
        """Which images of a stage of the search split are classified correctly, bool; measured once."""
        return self._correct(allocation, self.splits.search, 0, self.stages[stage], f"stage {stage}")

    def measure(self, allocation: Allocation | None, split: SplitName = "search", draw: int = 0) -> Accuracy:
        """Top-1 on a split with the bits of `allocation`, or in full precision; measured once."""
        if split == "search" and draw == 0:
            correct = np.concatenate([self.correct(allocation, stage) for stage in range(len(self.stages))])
        else:
            images: Images = getattr(self.splits, split)
            correct = self._correct(allocation, images, draw, np.arange(len(images)), "all")
        return Accuracy(int(correct.sum()), len(correct))

    def _correct(
        self, allocation: Allocation | None, images: Images, draw: int, rows: np.ndarray, part: str
    ) -> np.ndarray:
        calibration = "" if allocation is None else self.splits.calibrations[draw].digest
        bits = None if allocation is None else [allocation.weights, allocation.activations]

        def measured() -> str:
            with self._lock:
                logits = self._logits(allocation, images.pixels[torch.from_numpy(rows)], draw)
            return np.packbits(logits.argmax(1).numpy() == images.labels.numpy()[rows]).tobytes().hex()

        path = "float" if allocation is None else "integer" if self.unfit is None else "simulated"
        name = key("correct", quantizer.VERSION, path, self.digest, images.digest, calibration, bits, part)
        packed = np.frombuffer(bytes.fromhex(self._ledger.recall(name, measured)), dtype=np.uint8)
        return np.unpackbits(packed, count=len(rows)).astype(bool)

    @cached_property
    def layer_errors(self) -> list[float]:
        """Mean KL divergence (nats) of the output when one layer alone has the lowest weight bits.

        Everything else stays in full precision; on the first `ERROR_IMAGES` images of the
        search split, without labels. Measured once a network, bits and draw.
        """
        lowest = min(self.task.choices.weights)
        pixels = self.splits.search.pixels[:ERROR_IMAGES]

        def measured() -> list[float]:
            with self._lock:
                try:
                    table = sweep.layer_errors(self.network(0), self._program, pixels, [lowest])
                except Unfit:
                    table = sweep.layer_errors_one_by_one(self.network(0), pixels, self._batch, [lowest])
            return [error for (error,) in table]

        images = [self.splits.search.digest, len(pixels), self.splits.calibrations[0].digest]
        return self._ledger.recall(key("layer errors", quantizer.VERSION, self.digest, images, lowest), measured)
