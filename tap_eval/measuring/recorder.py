"""The steps of a network as they are run: recorded once for each size of a batch, and held against the network."""

from __future__ import annotations

from torch import Tensor

from tap_eval.device import out_of_memory
from tap_eval.images.images import Images
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.program import Program, record
from tap_eval.quantization.agreement import recorded_otherwise
from tap_eval.quantization.integer import Unfit


class Recorder:
    """Called with a number of images, it gives the network's steps for batches of so many."""

    def __init__(self, prepared: Prepared, images: Images | Tensor) -> None:
        """`images` are some of the network's, (N, C, H, W) where they are a tensor."""
        self._prepared = prepared
        self._images = images
        self._found: dict[int, Program | Unfit] = {}

    def __call__(self, batch: int) -> Program:
        """Raises `Unfit` when they cannot be recorded."""
        if batch not in self._found:
            try:
                self._found[batch] = self._record(batch)
            except Unfit as reason:
                self._found[batch] = reason
        found = self._found[batch]
        if isinstance(found, Unfit):
            raise found
        return found

    def evenly(self, count: int) -> Program | None:
        """For batches that divide so many images as evenly as can be; None when they cannot be recorded."""
        try:
            return self(-(-count // -(-count // self._prepared.batch)))
        except Unfit:
            return None

    def _record(self, batch: int) -> Program:
        pixels = next(iter(self._images.split(batch)))
        image = pixels[:1].to(self._prepared.device)
        try:
            program = record(self._prepared, image.expand(batch, *image.shape[1:]).contiguous())
            images = program.padded(pixels)
            place = recorded_otherwise(self._prepared, program, images)
        except Exception as error:  # the network's code under a tracer: whatever it raises, it cannot be recorded
            if out_of_memory(error):
                raise
            raise Unfit(f"its steps cannot be recorded ({type(error).__name__}: {error})") from error
        if place:
            raise Unfit(f"its steps, as they were recorded, compute something else than the network, first in {place}")
        return program
