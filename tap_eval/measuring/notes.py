"""What a user should know before the first figure, in sentences."""

from __future__ import annotations

import torch
from torch import Tensor

from tap_eval.measuring.accuracy import Accuracy
from tap_eval.preparing.prepared import Prepared

_SHARE_SAID = 0.01
"""of weights that stay in float32: above it, the user is told"""
_NAMED = 3


def left_in_float(prepared: Prepared) -> list[str]:
    """How much of a network is not quantized, and which tensors are the largest of it."""
    unused = sum(rest.count for rest in prepared.rest if not rest.used)
    notes = [f"{_size(unused)} of its weights are never used, and are not counted"] if unused else []
    if prepared.share_left > _SHARE_SAID:
        used = sorted((-rest.count, rest.name, rest.reason) for rest in prepared.rest if rest.used)
        names = ", ".join(f"{name} ({reason})" for _, name, reason in used[:_NAMED])
        more = f" and {len(used) - _NAMED} more" if len(used) > _NAMED else ""
        notes.append(
            f"{100 * prepared.share_left:.1f} % of its weights stay in float32, {_size(prepared.left)}, which sizes "
            f"count, and of budgets those in bytes: {names}{more}"
        )
    return notes


def _size(elements: int) -> str:
    """Of float32, in KiB."""
    return f"{4 * elements / 2**10:,.1f} KiB"


def at_chance(accuracy: Accuracy, labels: Tensor) -> list[str]:
    """That full precision cannot be told from the commonest of `labels`, (N,), if so and there are several."""
    commonest = int(torch.bincount(labels).max()) / len(labels)
    if accuracy.interval[0] > commonest or commonest == 1:
        return []
    return [
        f"in full precision {accuracy} of the images are classified correctly, no better than by always saying the "
        f"commonest class ({100 * commonest:.1f} %): the labels, the order of the classes (--classes), the transform "
        "or the weights may be wrong"
    ]
