"""A network on another device than the CPU, held against itself there."""

from __future__ import annotations

import numpy as np
import torch

from tap_eval.device import CPU, DeviceMistake, alone, in_float32
from tap_eval.images.images import Images
from tap_eval.preparing.prepared import Prepared

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
