"""In which order search images are looked at, and which of them candidates are not compared on."""

from __future__ import annotations

import math

import numpy as np

STAGES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""parts of the search split on which candidates are compared, each holding the one before; on the rest, which no
candidate is bred on, the winner is chosen"""


def stages(images: int) -> list[np.ndarray]:
    """The rows that each stage adds, and the rest, in an order that is not the source's.

    Some parts are empty where there are few images.
    """
    rows = np.random.default_rng(0).permutation(images)
    return [np.sort(part) for part in np.split(rows, [math.ceil(share * images) for share in STAGES])]
