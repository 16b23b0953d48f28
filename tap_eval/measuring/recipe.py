"""How a network is quantized to be measured, and how much of it is done and kept at a time."""

from __future__ import annotations

from dataclasses import dataclass

from tap_eval.measuring.weights import Kept
from tap_eval.preparing.prepared import Prepared
from tap_eval.quantization.ranges import RangeRule
from tap_eval.quantization.rounding import Rounding
from tap_eval.quantization.sums import SumsIn


@dataclass(frozen=True)
class Bounds:
    """How much is done and kept at a time."""

    batch: int = 125
    """images a pass in floating point"""
    packed: int = 2**30
    """bytes of packed weights that are kept"""
    features: int = 2**29
    """bytes in use while features are computed"""
    moments: int = 2**29
    """bytes of second moments of layers' inputs that are held at a time, by each thread that finishes a network"""


@dataclass(frozen=True)
class Recipe:
    """How the weights of a network are rounded, and where what was rounded is kept."""

    rounding: Rounding
    choices: tuple[int, ...]
    """bits that are rounded together"""
    content: str
    """names the network"""
    kept: Kept
    sums: SumsIn = "float"
    """in integers where the network's steps can be recorded"""
    ranges: RangeRule = "minmax"
    """how ranges of activations are chosen"""

    def activations(self, prepared: Prepared) -> list[str]:
        """What keys say of a network's activations: nothing of what is usual, so that what was kept is found."""
        rule = [] if self.ranges == "minmax" else [f"{self.ranges} ranges"]
        return [*rule, *(["attention 8"] if prepared.operands else [])]
