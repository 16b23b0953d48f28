"""A line of a table: what a row came to on one network, or what a paper says it did."""

from __future__ import annotations

import statistics
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

Kind = Literal["full precision", "proxy", "baseline", "search", "cited"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Figure(_Record):
    """A quantity, in the unit of its column."""

    values: tuple[float, ...]
    """one for each draw, seed or repetition"""

    @property
    def mean(self) -> float:
        """Over the values."""
        return statistics.mean(self.values)

    @property
    def spread(self) -> float | None:
        """One standard deviation of the values; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


class Line(_Record):
    """One row of a table. A line without figures says in its note why there are none."""

    network: str
    row: str
    kind: Kind
    budget: str = ""
    variant: str = ""
    """what a plan varies, with its value"""
    bits: str = ""
    """of weights and of activations, as W/A; * is mixed"""
    sees: str = ""
    """what its bits were found from"""
    figures: dict[str, Figure] = {}
    """by names of `COLUMNS`"""
    protocol: str = ""
    """how it was measured"""
    source: str = ""
    """of a cited line: where it stands"""
    reference: str = ""
    """likewise: whose method it is"""
    note: str = ""


class Column(NamedTuple):
    """How a quantity is shown."""

    head: str
    unit: str
    form: str
    """of a number, as `format` takes it"""

    @property
    def title(self) -> str:
        """Above the column."""
        return f"{self.head} ({self.unit})" if self.unit else self.head


COLUMNS = {
    "top1": Column("top-1", "%", ".2f"),
    "kl": Column("KL", "nats", ".3f"),
    "fitness": Column("best fitness", "", ".4f"),
    "bits": Column("bits a weight", "", ".2f"),
    "size": Column("size", "MiB", ".3g"),
    "smaller": Column("smaller", "%", ".2f"),
    "bops": Column("operations", "GBOPs", ".4g"),
    "latency": Column("layers' latencies", "ms", ".3g"),
    "images": Column("images", "", ",.0f"),
    "steps": Column("steps", "", ",.0f"),
    "seconds": Column("bits found in", "s", ".3g"),
    "rounding": Column("rounding before", "s", ".3g"),
    "describing": Column("features", "s", ".3g"),
    "scoring": Column("scoring", "s", ".4f"),
    "allocating": Column("allocating", "s", ".4f"),
    "proposals": Column("proposals", "", ",.1f"),
    "search_seconds": Column("search", "s", ",.0f"),
    "gpu_hours": Column("search", "GPU hours", ".4g"),
    "gain": Column("gain over the better parent", "", ".4f"),
    "gained": Column("gained", "%", ".1f"),
    "within": Column("spread in a generation", "", ".4f"),
    "within_change": Column("spread, change", "%", "+.1f"),
    "until": Column("proposals until it", "", ".1f"),
    "reached": Column("reach it", "seeds", ",.0f"),
    "until_change": Column("proposals, change", "%", "+.1f"),
}
"""the quantities of tables, in their order; and those that `failed` names"""
_FAILED = "failed "


def failed(when: object) -> str:
    """The name of the share of proposals whose code did not run, of a generation or a range of them."""
    return f"{_FAILED}{when}"


def column(name: str) -> Column:
    """How the quantity called `name` is shown."""
    return Column(name, "%", ".1f") if name.startswith(_FAILED) else COLUMNS[name]


def ordered(lines: list[Line], shows: tuple[str, ...] = ()) -> list[str]:
    """The quantities that any of the lines has, of those of `shows` where it names some, in the order of tables."""
    found = dict.fromkeys(name for line in lines for name in line.figures)
    shown = [name for name in found if not shows or name in shows or name.partition(" ")[0] in shows]
    return sorted(shown, key=lambda name: list(COLUMNS).index(name) if name in COLUMNS else len(COLUMNS))
