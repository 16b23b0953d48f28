"""Draws of calibration images that are distilled from a network, each made when it is asked for first, and kept."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, overload

import torch
from torch import nn

from tap_eval.images.images import Images, Splits
from tap_eval.kept import Kept
from tap_eval.measuring.ledger import key
from tap_eval.measuring.progress import Advance, silent
from tap_eval.preparing.copying import in_eval_mode
from tap_eval.preparing.distilling import STEPS, VERSION, distilled
from tap_eval.preparing.outputs import find_output

DISTILLED = "distilled"
"""in the place of an image source"""


@dataclass(eq=False)
class DistilledDraws(Sequence[Images]):
    """Draws of `size` images each, like those of `like` in shape and transform; their labels are the network's own.

    They are made on the CPU wherever the network is measured, so that a run may go on on another device.
    """

    network: nn.Module
    like: Images
    size: int
    draws: int
    seed: int
    kept: Kept
    output: str | None = None
    """name of the logits among what the network returns"""
    advance: Advance = silent
    steps: int = STEPS
    _made: dict[int, Images] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __len__(self) -> int:
        return self.draws

    @overload
    def __getitem__(self, draw: int) -> Images: ...
    @overload
    def __getitem__(self, draw: slice) -> Sequence[Images]: ...

    def __getitem__(self, draw: int | slice) -> Images | Sequence[Images]:
        places = range(self.draws)[draw]
        if isinstance(places, range):
            return [self[place] for place in places]
        with self._lock:
            if places not in self._made:
                self._made[places] = self._make(places)
            return self._made[places]

    def __iter__(self) -> Iterator[Images]:
        return (self[draw] for draw in range(self.draws))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another machine, whose floats may differ, gets the same images."""
        return tuple, (list(self),)

    def _make(self, draw: int) -> Images:
        shape = (self.size, *self.like.stored.shape[1:])
        how = [self.like.transform.model_dump(mode="json"), shape, self.steps, self.seed, draw]
        name = key(DISTILLED, VERSION, _content(self.network), how)
        found = self.kept.recall(name)
        if found is None:
            number = random.Random(f"{self.seed}/{draw}").getrandbits(63)
            told = partial(self.advance, f"distilling calibration images, draw {draw + 1}")
            found = {"images": distilled(self.network, self.like.transform, shape, number, self.steps, told)}
            self.kept.keep(name, found)
        images = replace(self.like, stored=found["images"].numpy(), remarks={}, rows=None)
        return replace(images, labels=self._labels(images))

    @torch.no_grad()
    def _labels(self, images: Images) -> torch.Tensor:
        pixels = images.pixels
        returned = in_eval_mode(self.network)(pixels)
        return find_output(returned, len(pixels), None, self.output).logits(returned).argmax(1)


def calibrated_on(splits: Splits, draws: DistilledDraws) -> Splits:
    """With distilled images in the place of calibration images."""
    note = (
        f"calibration images are distilled: {draws.size} a draw, made of noise until the network's batch "
        "normalizations find their statistics in them; their labels are what the network takes them for"
    )
    return replace(splits, calibrations=draws, notes=(*splits.notes, note))


def _content(network: nn.Module) -> str:
    """Names structure and tensors of a network."""
    content = hashlib.sha256(str(network).encode())
    for name, tensor in network.state_dict().items():
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
