"""The final table of one network: an allocation beside full precision and the baselines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from graphs.state import Bits
from tap_agent.runs.result import MeasuredTop1, Row, RowCost
from tap_agent.sessions.resources import names_of, second
from tap_agent.settings.model import Settings
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.latency import PICOSECONDS
from tap_eval.allocation.size import bops, weight_size
from tap_eval.baselines.baselines import baselines
from tap_eval.measuring.accuracy import Accuracy
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.job import SplitName
from tap_eval.quantization.quantizer import Allocation

Advance = Callable[[], None]
_UNFINISHED = "kept unfinished, which is nearer to full precision on the search images"


@dataclass(frozen=True)
class Entry:
    """A row that is to be measured: an allocation of the network of `bench`, or the mean of several."""

    bench: Bench
    budget: str
    label: str
    kind: Literal["proxy", "baseline"]
    note: str
    allocations: tuple[Allocation, ...]
    sees: tuple[str, ...] = ()
    cost: RowCost | None = None


def final_table(
    bench: Bench,
    label: str,
    allocation: Allocation,
    settings: Settings,
    advance: Advance,
    left_out: Callable[[str], None],
) -> list[Row]:
    """Full precision, the proxy's allocation and the baselines, on the search and test split and every draw.

    `advance` is called after each row, `left_out` with a sentence for each baseline that the network cannot have.
    """
    draws = len(bench.splits.calibrations)
    rows = [full_precision(bench)]
    advance()
    own = Entry(bench, bench.task.budget.text, label, "proxy", "", (allocation,), seen_by_proxies(bench))
    entries = [own, *beside(bench, settings, left_out)]
    finish(bench, entries, draws)
    for entry in entries:
        rows.append(measured(entry, draws))
        advance()
    return rows


def finish(bench: Bench, entries: Sequence[Entry], draws: int) -> None:
    """Finishes all of a network before they are measured, where that is asked for: together it takes half the time."""
    if bench.task.finish:
        bench.finish([allocation for entry in entries for allocation in entry.allocations], range(draws))


def seen_by_proxies(bench: Bench) -> tuple[str, ...]:
    """As the rows of baselines say what those see."""
    return ("metadata of layers",) if bench.task.inputs == "metadata" else ("statistics of layers",)


def beside(
    bench: Bench,
    settings: Settings,
    left_out: Callable[[str], None] | None = None,
    tell: Callable[[str], None] = lambda label: None,
    names: Sequence[str] = (),
) -> list[Entry]:
    """The baselines of the settings, or of `names`, within the budget of `bench`; see `baselines`."""
    count = measurements(bench, settings)
    found = baselines(bench, settings.seed, names or settings.baselines, count, left_out, tell)
    return [
        Entry(
            bench,
            bench.task.budget.text,
            each.label,
            "baseline",
            each.note,
            each.allocations,
            each.sees,
            RowCost(**vars(each.cost)),
        )
        for each in found
    ]


def measurements(bench: Bench, settings: Settings) -> int:
    """How many allocations of a network a search with these settings measures: each proposal at every budget."""
    network = settings.networks[names_of(settings.networks).index(bench.name)]
    budgets = len(Budget.parse_all(network.budget or settings.budget))
    if budgets == 1 and settings.second_budget and not settings.given:
        budgets += len(second(bench))
    return settings.proposals * budgets


def measured(entry: Entry, draws: int, *, search: bool = True, advance: Advance = lambda: None) -> Row:
    """Measures an entry on the test split under the first `draws` draws, and on the search split if `search`.

    `advance` is called for each allocation and draw, by several threads.
    """
    bench = entry.bench
    drawn = bench.measure_all(entry.allocations, "test", range(draws), kept=True, advance=advance)
    finished = {bits: bench.keeps_finished(bits) for bits in entry.allocations}
    not_nearer = bench.task.finish and not any(finished.values())
    tops, divergences = (
        [statistics.mean(getattr(each, of) for each in of_draw) for of_draw in drawn] for of in ("top1", "kl")
    )

    def mean(on: SplitName, kept: bool) -> MeasuredTop1:
        return _mean([bench.measure(bits, on, finished=kept and finished[bits]) for bits in entry.allocations])

    of_weights = statistics.mean(weight_size(bench.layers, bits) for bits in entry.allocations)
    sizes = [bench.size(bits) for bits in entry.allocations]
    return Row(
        label=entry.label,
        kind=entry.kind,
        network=bench.name,
        budget=entry.budget,
        note="; ".join(filter(None, [entry.note, _UNFINISHED if not_nearer else ""])),
        sees=entry.sees,
        cost=entry.cost,
        bits=of_weights / sum(layer.params for layer in bench.layers),
        size_bytes=math.ceil(statistics.mean(size.total for size in sizes)),
        parts=sizes[0].parts() if len(sizes) == 1 else {},
        in_float=bench.prepared.share_left,
        bops=round(statistics.mean(bops(bench.layers, bits) for bits in entry.allocations)),
        latency_ms=_latency(bench, entry.allocations),
        allocation=Bits.of(entry.allocations[0]) if len(entry.allocations) == 1 else None,
        search=mean("search", False) if search else None,
        test=mean("test", True),
        unfinished=mean("test", False) if bench.task.finish else None,
        draws=tops,
        spread=statistics.stdev(tops) if len(tops) > 1 else 0.0,
        kl_draws=divergences,
    )


def _latency(bench: Bench, allocations: Sequence[Allocation]) -> float | None:
    """ms an image, the mean over allocations."""
    latencies = bench.task.latencies
    if latencies is None:
        return None
    found = [latencies.total(bench.layers, bits) for bits in allocations]
    known = [each for each in found if each is not None]
    return statistics.mean(known) / PICOSECONDS if len(known) == len(found) else None


def full_precision(bench: Bench, *, search: bool = True) -> Row:
    """The network as it is, on the test split, and on the search split if `search`."""
    size = bench.size(None)
    test = _mean([bench.measure(None, "test")])
    return Row(
        label="full precision",
        kind="full precision",
        network=bench.name,
        bits=32,
        size_bytes=size.total,
        parts=size.parts(),
        in_float=bench.prepared.share_left,
        bops=sum(layer.macs for layer in bench.layers) * 32 * 32,
        search=_mean([bench.measure(None)]) if search else None,
        test=test,
        draws=[test.top1],
        spread=0.0,
        kl_draws=[0.0],
    )


def _mean(found: Sequence[Accuracy]) -> MeasuredTop1:
    """The mean over allocations; its interval is that of one measurement with the mean count."""
    correct = round(statistics.mean(accuracy.correct for accuracy in found))
    accuracy = Accuracy(correct, found[0].count)
    low, high = accuracy.interval
    kl = statistics.mean(accuracy.kl for accuracy in found)
    return MeasuredTop1(correct=correct, count=accuracy.count, top1=accuracy.top1, low=low, high=high, kl=kl)
