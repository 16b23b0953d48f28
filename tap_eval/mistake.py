"""A user's mistake: one sentence with the value, what is accepted, and the next step.

Each subclass is one kind; the command line gives each `kind` an exit code of its own.
"""

from __future__ import annotations

from typing import ClassVar


class Mistake(Exception):
    """Something the user can put right; `str()` of it is the whole message."""

    kind: ClassVar[str] = "failed"


class NetworkMistake(Mistake):
    """A network that is unknown or that cannot be built."""

    kind = "network"


class WeightsMistake(Mistake):
    """Weights that are missing, unreadable, or of another network."""

    kind = "weights"


class ImagesMistake(Mistake):
    """An image source without images, with other classes, or that cannot be read."""

    kind = "images"


class BudgetMistake(Mistake):
    """A budget that is not one, or that no allocation can meet."""

    kind = "budget"


class BitsMistake(Mistake):
    """Bits outside the choices, or choices outside 2 to 8."""

    kind = "bits"


class ExportMistake(Mistake):
    """A file of a network that cannot be written, or that is none."""

    kind = "export"


class BenchmarkMistake(Mistake):
    """A file of measured allocations that cannot be made or read, or that is of another network."""

    kind = "benchmark"


class ProxyMistake(Mistake):
    """A proxy that cannot be read, or that does not run."""

    kind = "proxy"


class DamagedMistake(Mistake):
    """A file that is not what was written: cut, changed, empty, or of a `newer` version."""

    kind = "damaged"

    def __init__(self, sentence: str, *, newer: bool = False) -> None:
        super().__init__(sentence)
        self.newer = newer


class StorageMistake(Mistake):
    """A disk that is full, or a folder that takes no files."""

    kind = "storage"
