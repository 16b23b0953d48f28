"""A network on other devices than the CPU: brought there, and on several of them side by side."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tap_eval.device import CPU, DeviceMistake, alone, in_float32
from tap_eval.images.images import Images
from tap_eval.measuring.job import Job, Measures
from tap_eval.preparing.prepared import Prepared

if TYPE_CHECKING:
    from tap_eval.measuring.measurer import Measurer

_LOOKED_AT = 2
"""images whose outputs are compared with the CPU's"""
_APART = 1e-3
"""of the largest logit: more is said"""


@torch.no_grad()
def brought(prepared: Prepared, device: torch.device, images: Images) -> tuple[Prepared, list[str]]:
    """A network on `device`, itself on the CPU; and a note, after "is measured", where its outputs are others there.

    Raises `DeviceMistake` when it does not run there.
    """
    if device == CPU:
        return prepared, []
    in_float32(device)
    pixels = images.only(np.arange(min(_LOOKED_AT, len(images)))).pixels
    try:
        with alone(device):
            resident = prepared.on(device)
            got = resident(pixels).cpu()
    except Exception as error:  # the network's code is the user's: whatever it raises, it does not run there
        said = " ".join(str(error).split())[:300]
        raise DeviceMistake(
            f"{device}: the network does not run there ({type(error).__name__}: {said}): take --device cpu."
        ) from error
    expected = prepared(pixels)
    apart = float((got - expected).abs().max() / expected.abs().max())
    if apart <= _APART:
        return resident, []
    return resident, [f"on {device}, where in full precision its outputs are {100 * apart:.2g} % of the largest apart"]


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
