"""A proxy, and the one taxonomy of the ways in which a proxy can fail.

A candidate's failure is a result, so it travels as a value: `Rejection` says which of the
`Failure` kinds it was and, in one sentence an agent can act on, why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tap_eval.allocation.score import Scores, layer_score

LONGEST_MESSAGE = 1000
"""characters of what a rejection says"""


class Failure(StrEnum):
    """Why a candidate died; the words are those of the event log and of the report."""

    UNPARSABLE = "unparsable"
    FORBIDDEN = "forbidden"
    ERROR = "error"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    WRONG_SHAPE = "wrong shape"
    NOT_FINITE = "not finite"
    CONSTANT = "constant"
    OVER_BUDGET = "over budget"
    DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Proxy:
    """The paper's (T, C): `thought` is the reasoning in plain language, `code` is Python."""

    thought: str
    code: str


@dataclass(frozen=True)
class Rejection:
    """One candidate's death: the kind, and a sentence that an agent can repair from."""

    failure: Failure
    message: str
    """on one line, cut to what a prompt and a terminal can take"""

    def __post_init__(self) -> None:
        words = " ".join(self.message[:LONGEST_MESSAGE].split())
        object.__setattr__(self, "message", "".join(letter for letter in words if letter.isprintable()))


def checked_scores(value: object, channels: Sequence[int], by_channel: bool) -> Scores | Rejection:
    """What `sensitivity` returned, checked.

    `value` must hold one entry a layer: a number, or a list of numbers, one for each of the
    layer's output channels (`channels[i]` of them), of which the mean is kept unless `by_channel`.
    """
    if not isinstance(value, list) or len(value) != len(channels):
        got = f"{len(value)} entries" if isinstance(value, list) else type(value).__name__
        return Rejection(
            Failure.WRONG_SHAPE,
            f"sensitivity must return a list of {len(channels)} entries, one a layer; it returned {got}.",
        )
    scores: Scores = []
    for index, (entry, count) in enumerate(zip(value, channels, strict=True)):
        numbers = entry if isinstance(entry, list) else [entry]
        if isinstance(entry, list) and len(entry) != count:
            return Rejection(
                Failure.WRONG_SHAPE,
                f"layer {index} has {count} output channels; its entry is a list of {len(entry)}.",
            )
        checked = [_number(number) for number in numbers]
        if None in checked:
            return Rejection(
                Failure.WRONG_SHAPE,
                f"layer {index}: {type(numbers[checked.index(None)]).__name__} is not a number.",
            )
        finite = [number for number in checked if number is not None and math.isfinite(number)]
        if len(finite) < len(checked):
            return Rejection(Failure.NOT_FINITE, f"the score of layer {index} is NaN or infinite.")
        scores.append(finite if isinstance(entry, list) else finite[0])
    if not all(math.isfinite(layer_score(score)) for score in scores):
        return Rejection(Failure.NOT_FINITE, "the mean over a layer's channels overflows.")
    if not by_channel:
        scores = [layer_score(score) for score in scores]
    everything = [number for score in scores for number in (score if isinstance(score, list) else [score])]
    if len(everything) > 1 and max(everything) == min(everything):
        return Rejection(Failure.CONSTANT, f"every layer has the score {everything[0]:g}: there is nothing to rank.")
    return scores


def _number(value: object) -> float | None:
    """`value` as a float; integers too large for one become infinite, and booleans are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
