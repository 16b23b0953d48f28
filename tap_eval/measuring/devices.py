"""A network on several devices side by side."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tap_eval.measuring.job import Job, Measures
from tap_eval.measuring.measurer import Measurer


class SideBySide:
    """Measurers of one network on several devices; a job goes to one that is free, what is done once to the first."""

    def __init__(self, measurers: Sequence[Measurer]) -> None:
        self._measurers = measurers
        self._idle: queue.SimpleQueue[Measurer] = queue.SimpleQueue()
        for each in measurers:
            self._idle.put(each)

    @property
    def workers(self) -> int:
        """See `Measures.workers`."""
        return len(self._measurers)

    @property
    def unfit(self) -> str | None:
        """See `Measures.unfit`."""
        return self._measurers[0].unfit

    @property
    def sums(self) -> bool:
        """See `Measures.sums`."""
        return self._measurers[0].sums

    @property
    def notes(self) -> list[str]:
        """See `Measures.notes`."""
        return [*self._measurers[0].notes, f"on {', '.join(str(each.device) for each in self._measurers)} side by side"]

    def logits(self, job: Job) -> Tensor:
        """See `Measures.logits`."""
        measurer = self._idle.get()
        try:
            return measurer.logits(job)
        finally:
            self._idle.put(measurer)

    def layer_errors(self, bits: int, count: int) -> list[float]:
        """See `Measures.layer_errors`."""
        return self._measurers[0].layer_errors(bits, count)


def spread_over(devices: Sequence[torch.device]) -> Callable[[Measurer], Measures]:
    """Brings a network, which is on the first of `devices`, to the others too."""

    def spread(measurer: Measurer) -> Measures:
        others = [measurer.beside(device) for device in devices[1:]]
        return SideBySide([measurer, *others]) if others else measurer

    return spread
