"""Measuring the allocations of one network in this process: integers where they fit, else the simulated path.

On the CPU integers are multiplied; any other device takes the simulated path.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch

from tap_eval.device import CPU, alone, on, out_of_memory
from tap_eval.images.images import Images, Splits
from tap_eval.kept import Kept
from tap_eval.measuring.job import Job
from tap_eval.measuring.layer_errors import layer_errors, layer_errors_one_by_one
from tap_eval.measuring.ledger import key
from tap_eval.measuring.progress import Advance, silent
from tap_eval.measuring.recipe import Bounds, Recipe
from tap_eval.measuring.recorder import Recorder
from tap_eval.measuring.resident import brought
from tap_eval.measuring.rounded import RoundedWeights
from tap_eval.measuring.threads import one_thread_each
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.program import Program, bind
from tap_eval.quantization import finishing
from tap_eval.quantization.agreement import NOISE, multiplied_otherwise
from tap_eval.quantization.calibration import calibrate, calibrate_operands
from tap_eval.quantization.integer import IntegerNetwork, KeptWeights, Unfit
from tap_eval.quantization.quantizer import VERSION, Allocation, Integers, QuantizedNetwork, QuantizedWeight
from tap_eval.quantization.sums import Ranged, Sums, calibrated, ranged

_Result = TypeVar("_Result")
_NETWORKS_KEPT = 4
"""rewritten for as many draws or activation bits; the weights in use are theirs"""
_LEAST_INTEGER_BATCH = 8
_FINISHED_TOGETHER = 4
"""networks that a thread finishes layer by layer side by side, whose activations are in memory together"""
_PARTS = ("integers", "scale", "bias", "bits")


class Measurer:
    """One network and its images in memory. Methods may be called from several threads; they take turns."""

    workers = 1

    def __init__(
        self,
        prepared: Prepared,
        splits: Splits,
        highest: Allocation,
        bounds: Bounds,
        recipe: Recipe,
        advance: Advance = silent,
        device: torch.device = CPU,
    ) -> None:
        """`highest` is the allocation on which both paths are compared; `prepared` is on the CPU.

        Raises `DeviceMistake` when the network does not run on `device`.
        """
        self.prepared = prepared
        self.device = device
        self._resident, self._differing = brought(prepared, device, splits.calibrations[0])
        self._splits = splits
        self._highest = highest
        self._bounds = bounds
        self._recipe = recipe
        self._advance = advance
        self._batch = bounds.batch
        self._lock = threading.RLock()
        self._networks: dict[int, QuantizedNetwork] = {}
        self._rounded: dict[int, RoundedWeights] = {}
        self._integer_networks: OrderedDict[tuple[int, tuple[int, ...]], IntegerNetwork] = OrderedDict()
        self._kept = KeptWeights(bounds.packed)
        self._recorded = Recorder(self._resident, splits.calibrations[0])
        self._finished_last: tuple[str, list[QuantizedWeight]] = ("", [])

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process makes everything else anew."""
        return Measurer, (*self._made_of, silent, self.device)

    @property
    def _made_of(self) -> tuple[Prepared, Splits, Allocation, Bounds, Recipe]:
        return self.prepared, self._splits, self._highest, self._bounds, self._recipe

    def beside(self, device: torch.device) -> Measurer:
        """Another of the same network, on another device."""
        return Measurer(*self._made_of, self._advance, device)

    def network(self, draw: int) -> QuantizedNetwork:
        """The network calibrated on draw `draw`, with every (layer, bits) it has met kept."""
        if draw not in self._networks:
            images, recipe, resident = self._splits.calibrations[draw], self._recipe, self._resident
            seen = resident.fitting(lambda: calibrate(resident, images.pixels, recipe.ranges))
            content = [recipe.content, "" if recipe.rounding == "nearest" else images.digest]
            rounded = RoundedWeights(
                resident, images.pixels, seen, recipe.rounding, recipe.choices, content, recipe.kept,
                self._bounds.moments, self._advance,
            )  # fmt: skip
            self._rounded[draw] = rounded
            operands = resident.fitting(lambda: calibrate_operands(resident, images.pixels, recipe.ranges))
            self._networks[draw] = QuantizedNetwork(resident, seen, self._integers_of(draw), self._sums(draw), operands)
        return self._networks[draw]

    def _sums(self, draw: int) -> Sums | None:
        if not self.sums:
            return None
        pixels = self._splits.calibrations[draw].pixels
        return calibrated(self._recorded, self._resident, pixels, self._recipe.ranges)

    @cached_property
    def _sums_differing(self) -> str | None:
        """Why sums are in float32 that were to be in integers."""
        if self._recipe.sums == "float":
            return None
        with self._lock, alone(self.device):
            try:
                self._resident.fitting(lambda: (self._program, self._ranged_in))
            except Unfit as reason:
                return str(reason)
        return None

    @property
    def sums(self) -> bool:
        """See `Measures.sums`."""
        return self._recipe.sums == "int8" and not self._sums_differing

    @cached_property
    def between(self) -> Ranged:
        """The values that are rounded between layers."""
        return ranged(self._program if self.sums else None, self.prepared)

    def _integers_of(self, draw: int) -> list[Integers]:
        return [partial(self._rounded[draw], layer.index) for layer in self.prepared.layers]

    def round(self) -> None:
        """Rounds all layers at all bits to choose from, on the first draw, unless that is done."""
        with self._lock, alone(self.device):
            self.network(0)
            self._rounded[0](0, min(self._recipe.choices))

    def anew(self) -> Measurer:
        """Another of the same network, which finds nothing kept and keeps nothing."""
        prepared, splits, highest, bounds, recipe = self._made_of
        recipe = replace(recipe, kept=Kept(None))
        return Measurer(prepared, splits, highest, bounds, recipe, self._advance, self.device)

    def quantized(self, draw: int, allocation: Allocation, finished: bool) -> QuantizedNetwork:
        """One of its own with the bits of `allocation`, on draw `draw`, on the CPU."""
        with self._lock, alone(self.device):
            ready = self.network(draw)
            layers = ready.layers
            if finished:
                weights = self.finished(draw, allocation)
            else:
                weights = [layer.quantized(bits) for layer, bits in zip(layers, allocation.weights, strict=True)]
            integers = [lambda bits, its=its: on(its(bits), CPU) for its in self._integers_of(draw)]
            sums = ready.sums
            if sums and self.device != CPU:
                sums = replace(sums, recorded=self.beside(CPU)._recorded)
            seen = [on(layer.seen, CPU) for layer in layers]
            network = QuantizedNetwork(self.prepared, seen, integers, sums, ready.operand_ranges)
            network.take([on(weight, CPU) for weight in weights], allocation.activations)
        return network

    def finish(self, draw: int, allocations: Iterable[Allocation]) -> None:
        """Finishes and keeps those that are not kept yet, as many side by side as torch has threads."""
        names = {allocation: self._finished_name(draw, allocation) for allocation in allocations}
        with self._lock, alone(self.device):
            missing = [allocation for allocation, name in names.items() if not self._recipe.kept.holds(name)]
            if missing and self._recipe.kept.folder:
                self._resident.fitting(lambda: self._finish(draw, missing))

    def finished(self, draw: int, allocation: Allocation) -> list[QuantizedWeight]:
        """The weights of every layer, rounded once more for `allocation` on draw `draw`; kept like the others."""
        name = self._finished_name(draw, allocation)
        with self._lock, alone(self.device):
            if self._finished_last[0] != name:
                tensors = self._recipe.kept.recall(name)
                if tensors is None:
                    (found,) = self._resident.fitting(lambda: self._finish(draw, [allocation]))
                else:
                    parts = [[tensors[f"{layer.index}.{part}"] for part in _PARTS] for layer in self.prepared.layers]
                    found = [on(QuantizedWeight(*each), self.device) for each in parts]
                self._finished_last = name, found
            return self._finished_last[1]

    def _finished_name(self, draw: int, allocation: Allocation) -> str:
        recipe, calibration = self._recipe, self._splits.calibrations[draw]
        bits = [allocation.weights, allocation.activations]
        how = [recipe.rounding, recipe.choices, self._bounds.moments, *(["int8"] if self.sums else [])]
        how += recipe.activations(self.prepared)
        return key("finished", VERSION, finishing.VERSION, how, recipe.content, calibration.digest, bits)

    def _finish(self, draw: int, allocations: Sequence[Allocation]) -> list[list[QuantizedWeight]]:
        """Finishes and keeps them, each in a network of its own, some of them together by each thread."""
        pixels, ready = self._splits.calibrations[draw].pixels, self.network(draw)
        layers, seen = ready.layers, [layer.seen for layer in ready.layers]
        done, count = itertools.count(1), len(layers) * len(allocations)
        program = self._recorded.evenly(len(pixels))

        def finished(some: Sequence[Allocation]) -> list[list[QuantizedWeight]]:
            made_of = self._resident, seen, self._integers_of(draw), ready.sums, ready.operand_ranges
            networks = [QuantizedNetwork(*made_of) for _ in some]
            dampings = [
                [self._rounded[draw].damping(index, bits) for index, bits in enumerate(allocation.weights)]
                for allocation in some
            ]
            found = finishing.finish_all(
                networks, program, pixels, some, dampings, self._bounds.moments,
                lambda: self._advance("finishing layers", next(done), count),
            )  # fmt: skip
            for allocation, weights in zip(some, found, strict=True):
                parts = ((place, vars(each)) for place, each in enumerate(weights))
                named = {f"{place}.{part}": value for place, each in parts for part, value in each.items()}
                self._recipe.kept.keep(self._finished_name(draw, allocation), named)
            return found

        for allocation in allocations:  # rounded before, by all threads
            for layer, bits in zip(layers, allocation.weights, strict=True):
                layer.quantized(bits)
        size = 1 if program is None else min(-(-len(allocations) // torch.get_num_threads()), _FINISHED_TOGETHER)
        groups = [allocations[start : start + size] for start in range(0, len(allocations), size)]
        with one_thread_each(self.device) as threads:
            # where there is no program the network's own code runs, which may keep values of a pass
            several = map(finished, groups) if program is None else threads.map(finished, groups)
            return [weights for group in several for weights in group]

    @property
    def _program(self) -> Program:
        return self._recorded(self._resident.batch)

    @property
    def _ranged_in(self) -> Program:
        """Ranges other than from the least to the greatest number are chosen image by image."""
        return self._program if self._recipe.ranges == "minmax" else self._recorded(1)

    @property
    def _integer_program(self) -> Program:
        """Integers want more images a batch than floats: each product takes long to begin."""
        return self._recorded(max(self.prepared.batch, _LEAST_INTEGER_BATCH))

    @cached_property
    def _layout(self) -> torch.memory_format:
        """Channels last, as the integer path has them, unless the network's code takes another order for granted."""
        images = self._splits.calibrations[0].pixels[: self._resident.batch].to(self.device)
        try:
            with torch.inference_mode():
                expected = self._in_full(images)
                got = self._in_full(images.contiguous(memory_format=torch.channels_last))
        except RuntimeError:  # it calls `view`
            return torch.contiguous_format
        same = torch.allclose(got, expected, rtol=0, atol=NOISE * float(expected.abs().max()))
        return torch.channels_last if same else torch.contiguous_format

    def _in_full(self, images: torch.Tensor) -> torch.Tensor:
        """The logits in full precision, computed as the simulated path is."""
        if not self.sums:
            return self._resident(images)
        program = bind(self._program, self._resident.modules)
        return program.run(program.begin(program.padded(images)))[: len(images)]

    @cached_property
    def unfit(self) -> str | None:
        """See `Measures.unfit`."""
        if self.device != CPU:
            return f"{self.device} multiplies whole numbers as floats"
        pixels = self._splits.calibrations[0].pixels
        with self._lock:
            try:
                network = self.network(0)
                network.choose(self._highest)
                program = self._resident.fitting(lambda: self._integer_program)
                fast = self._integer_network(0, self._highest)
                fast.choose(self._highest)
                place = multiplied_otherwise(fast, program, network, program.padded(pixels[: program.batch]))
            except Unfit as reason:
                return str(reason)
            except RuntimeError as error:  # an operator that this build or this CPU does not have
                return f"integers cannot be multiplied here ({error})"
        return place and f"integers give something else than the simulated path does, first in {place}"

    @property
    def notes(self) -> list[str]:
        """See `Measures.notes`."""
        notes = [*([f"without integers: {self.unfit}"] if self.unfit else []), *self._differing]
        if self._sums_differing:
            notes.append(f"with sums in float32, in place of --sums int8: {self._sums_differing}")
        if self._batch < self._bounds.batch:
            notes.append(f"in batches of {self._batch}, since {self._bounds.batch} images did not fit the memory")
        for rounded in self._rounded.values():
            fallen, count = rounded.fallen
            if fallen:
                notes.append(
                    f"with {fallen} of {count} weights, by layer and bits, rounded to the nearest, since "
                    "GPTQ was worse on calibration images that were left out"
                )
        if blocked := next(iter(self._rounded.values())).blocked if self._rounded else ():
            notes.append(
                f"with inputs in blocks when {', '.join(blocked)} are rounded, whose second moments are above "
                f"{self._bounds.moments // 2**21:,} MiB (moments_mib)"
            )
        return notes

    def logits(self, job: Job) -> torch.Tensor:
        """See `Measures.logits`."""
        images: Images = getattr(self._splits, job.split).on(self.device)
        if job.integers and self.unfit:
            raise RuntimeError(f"this worker cannot measure as the others do: {self.unfit}")
        if job.allocation and job.sums != self.sums:
            raise RuntimeError(f"this worker cannot measure as the others do: {self._sums_differing or 'sums'}")
        with self._lock:
            part = images.only(job.rows)
            return (self._integers(job).logits(part) if job.integers else self._simulated(job, part)).float()

    def layer_errors(self, bits: int, count: int) -> list[float]:
        """See `Measures.layer_errors`."""
        pixels = self._splits.search.only(np.arange(count)).on(self.device)

        def table() -> list[list[float]]:
            network, advance = self.network(0), partial(self._advance, "measuring layer errors")
            for layer in network.layers:  # by all threads, and told as what it is
                layer.quantized(bits)
            try:
                return layer_errors(network, self._program, pixels, [bits], advance)
            except Unfit:
                return self._in_batches(lambda batch: layer_errors_one_by_one(network, pixels, batch, [bits], advance))

        with self._lock, alone(self.device):
            return [error for (error,) in self._resident.fitting(table)]

    def _simulated(self, job: Job, pixels: Images) -> torch.Tensor:
        """The logits (N, classes) on the CPU."""
        with alone(self.device):
            network, layout = self.network(job.draw), self._layout
            if job.finished and job.allocation:
                network.take(self.finished(job.draw, job.allocation), job.allocation.activations)
            else:
                network.choose(job.allocation)

        def logits(batch: int) -> torch.Tensor:
            found = []
            for part in pixels.split(batch):
                with alone(self.device):
                    found.append(network.logits(part.contiguous(memory_format=layout), batch))
            return torch.cat(found).cpu()

        if network.sums and job.allocation:  # in the batches of steps that are recorded anyway
            return self._resident.fitting(lambda: logits(self._resident.batch))
        return self._in_batches(logits)

    def _in_batches(self, compute: Callable[[int], _Result]) -> _Result:
        """`compute(batch)`, from its start again with half of the batch as long as memory is too small for it."""
        while True:
            try:
                return compute(self._batch)
            except RuntimeError as error:
                if not out_of_memory(error) or self._batch == 1:
                    raise
                self._batch //= 2

    def _integers(self, job: Job) -> IntegerNetwork:
        """The integer network with the weights of the job."""
        assert job.allocation is not None
        network = self._integer_network(job.draw, job.allocation)
        if job.finished:
            network.take(self.finished(job.draw, job.allocation))
        else:
            network.choose(job.allocation)
        return network

    def _integer_network(self, draw: int, allocation: Allocation) -> IntegerNetwork:
        """The integer network for the activation bits of `allocation`."""
        place = (draw, allocation.activations)
        network = self._integer_networks.pop(place, None) or IntegerNetwork(
            self.network(draw), self._integer_program, allocation.activations, self._kept
        )
        self._integer_networks[place] = network
        if len(self._integer_networks) > _NETWORKS_KEPT:
            self._integer_networks.popitem(last=False)
        return network
