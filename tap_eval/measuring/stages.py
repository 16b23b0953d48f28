"""In which order search images are looked at, and which of them candidates are not compared on."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from tap_eval.images.images import Images

STAGES = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
"""parts of the search split on which candidates are compared, each holding the one before; on the rest, which no
candidate is bred on, the winner is chosen"""

_LARGE = 64
"""pixels a side above which networks take so long that fewer images are looked at"""
_WATCHED, _WATCHED_LARGE = 32, 16


def watched(search: Images, most: int) -> Tensor:
    """The images of the search split on which a prepared network is held against the original, no more than `most`."""
    count = _WATCHED if search.size <= _LARGE else _WATCHED_LARGE
    return search.only(np.arange(min(count, most, len(search)))).pixels


def stages(images: int) -> list[np.ndarray]:
    """The rows that each stage adds, and the rest, in an order that is not the source's.

    Some parts are empty where there are few images.
    """
    rows = np.random.default_rng(0).permutation(images)
    return [np.sort(part) for part in np.split(rows, [math.ceil(share * images) for share in STAGES])]
