"""The result of a run, as `result.json` holds it and as the report shows it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from graphs.state import Bits, Candidate, Generation


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class MeasuredTop1(_Record):
    """Top-1 with its count and 95 % Wilson interval; shares in [0, 1]."""

    correct: int
    count: int
    top1: float
    low: float
    high: float


class Row(_Record):
    """One line of the final table: an allocation of one network, or the mean of several."""

    label: str
    kind: Literal["full precision", "proxy", "baseline"]
    network: str
    note: str = ""
    bits: float
    """average weight bits"""
    size_bytes: int
    bops: int
    allocation: Bits | None = None
    search: MeasuredTop1
    test: MeasuredTop1
    draws: list[float]
    """test top-1 under each calibration draw, with the same bits; the first is `test`"""
    spread: float
    """standard deviation over `draws`"""


class LayerRecord(_Record):
    name: str
    kind: str
    params: int
    macs: int


class NetworkRecord(_Record):
    name: str
    images: str
    budget: str
    layers: list[LayerRecord]
    layer_errors: list[float]
    """nats, at the lowest bit choice"""


class Result(_Record):
    """Everything that a report shows."""

    run: str
    config: dict[str, Any]
    seconds: float
    tokens: int
    measured: int
    """allocations and layer errors that had to be measured; the rest was recalled"""
    networks: list[NetworkRecord]
    generations: list[Generation]
    candidates: list[Candidate]
    best: str
    table: list[Row]
