"""The final table of one network: the proxy's allocation beside full precision and the baselines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from graphs.state import Bits
from tap_agent.runs.result import MeasuredTop1, Row
from tap_eval.allocation.size import bops, weight_size
from tap_eval.baselines.baselines import baselines
from tap_eval.measuring.accuracy import Accuracy
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.measurer import SplitName
from tap_eval.quantization.quantizer import Allocation

Advance = Callable[[], None]


def final_table(
    bench: Bench, label: str, allocation: Allocation, seed: int, advance: Advance, search: bool = True
) -> list[Row]:
    """Full precision, the proxy's allocation and the baselines, on the test split and every calibration draw.

    `advance` is called after each row. Without `search` no accuracy is measured on the search split.
    """

    def row(label: str, kind: Literal["proxy", "baseline"], note: str, allocations: Sequence[Allocation]) -> Row:
        every = range(len(bench.splits.calibrations))
        draws = bench.measure_all(allocations, "test", every).mean(1).tolist()

        def measured(on: SplitName) -> MeasuredTop1:
            return _mean([bench.measure(bits, on) for bits in allocations])

        of_weights = statistics.mean(weight_size(bench.layers, bits) for bits in allocations)
        sizes = [bench.size(bits) for bits in allocations]
        found = Row(
            label=label,
            kind=kind,
            network=bench.name,
            note=note,
            bits=of_weights / sum(layer.params for layer in bench.layers),
            size_bytes=math.ceil(statistics.mean(size.total for size in sizes)),
            parts=sizes[0].parts() if len(sizes) == 1 else {},
            in_float=bench.prepared.share_left,
            bops=round(statistics.mean(bops(bench.layers, bits) for bits in allocations)),
            allocation=Bits.of(allocations[0]) if len(allocations) == 1 else None,
            search=measured("search") if search else None,
            test=measured("test"),
            draws=draws,
            spread=statistics.stdev(draws) if len(draws) > 1 else 0.0,
        )
        advance()
        return found

    rows = [_full_precision(bench, search), row(label, "proxy", "", [allocation])]
    advance()
    return rows + [row(each.label, "baseline", each.note, each.allocations) for each in baselines(bench, seed)]


def _full_precision(bench: Bench, search: bool) -> Row:
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
    )


def _mean(found: Sequence[Accuracy]) -> MeasuredTop1:
    """The mean over allocations; its interval is that of one measurement with the mean count."""
    correct = round(statistics.mean(accuracy.correct for accuracy in found))
    accuracy = Accuracy(correct, found[0].count)
    low, high = accuracy.interval
    return MeasuredTop1(correct=correct, count=accuracy.count, top1=accuracy.top1, low=low, high=high)
