"""The result of a run, as `result.json` holds it and as the report shows it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from agents.account import Spent
from graphs.state import Bits, Candidate, Generation, SearchState
from tap_eval.allocation.size import bops, weight_size
from tap_eval.baselines.baselines import baselines
from tap_eval.measuring.accuracy import Accuracy
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.measurer import SplitName
from tap_eval.networks.layers import Layer
from tap_eval.quantization import quantizer
from tap_eval.quantization.quantizer import Allocation


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
    search: MeasuredTop1 | None
    test: MeasuredTop1
    draws: list[float]
    """test top-1 under each calibration draw, with the same bits; the first is `test`"""
    spread: float
    """standard deviation over `draws`"""


class LayerRecord(_Record):
    """What the report needs of a layer."""

    name: str
    kind: str
    params: int
    macs: int


class NetworkRecord(_Record):
    """One network of the benchmark set."""

    name: str
    images: str
    budget: str
    layers: list[LayerRecord]
    layer_errors: list[float]
    """nats, at the lowest bit choice"""


class Course(_Record):
    """How a search went, or how far it has come: what figures are drawn from."""

    networks: list[NetworkRecord]
    generations: list[Generation]
    candidates: list[Candidate]
    refinements: list[Candidate] = []
    """what conversations made of them, after the search"""
    best: str | None
    """of the search; None while no candidate lives"""
    table: list[Row] = []

    @property
    def everyone(self) -> list[Candidate]:
        """Every candidate, of the search and of conversations."""
        return [*self.candidates, *self.refinements]

    def candidate(self, name: str) -> Candidate:
        """The candidate called `name`."""
        return next(candidate for candidate in self.everyone if candidate.name == name)


class Result(Course):
    """A search that has ended: everything that a report shows."""

    run: str
    config: dict[str, Any]
    seconds: float
    spent: Spent | None = None
    """on language models; None in results of before this was counted"""
    stopped: str | None = None
    """the limit that stopped the search early, in a sentence"""
    test_reads: int = 1
    """times that the table was measured on the test split: more than once where a limit stopped the search before"""
    measured: int
    """allocations and layer errors that had to be measured; the rest was recalled"""
    best: str


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

        size = round(statistics.mean(weight_size(bench.layers, bits) for bits in allocations))
        found = Row(
            label=label,
            kind=kind,
            network=bench.name,
            note=note,
            bits=size / sum(layer.params for layer in bench.layers),
            size_bytes=-(-size // 8),
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
    params = sum(layer.params for layer in bench.layers)
    test = _mean([bench.measure(None, "test")])
    return Row(
        label="full precision",
        kind="full precision",
        network=bench.name,
        bits=32,
        size_bytes=4 * params,
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


def conclude(
    run: str, config: dict[str, Any], state: SearchState, benches: Sequence[Bench], seed: int, advance: Advance
) -> Result:
    """The result of a search that found a living proxy; reads the test split."""
    candidates = [Candidate(**record) for _, record in sorted(state["candidates"].items())]
    assert state["best"] is not None
    best = Candidate(**state["candidates"][state["best"]])
    table = [
        row
        for bench, bits in zip(benches, best.allocations, strict=True)
        for row in final_table(bench, f"TAP ({best.name})", bits.allocation(), seed, advance)
    ]
    return Result(
        run=run,
        config=config,
        seconds=0.0,
        measured=0,
        networks=[network_record(bench) for bench in benches],
        generations=[Generation(**record) for record in state["generations"]],
        candidates=candidates,
        best=best.name,
        table=table,
    )


def network_record(bench: Bench) -> NetworkRecord:
    """A network as the report shows it."""
    return NetworkRecord(
        name=bench.name,
        images=bench.splits.name,
        budget=bench.task.budget.text,
        layers=[LayerRecord(name=x.name, kind=x.kind, params=x.params, macs=x.macs) for x in bench.layers],
        layer_errors=bench.layer_errors,
    )


def best_record(
    thought: str, code: str, rows: Sequence[Row], layers: Sequence[Sequence[Layer]], provenance: dict[str, Any]
) -> dict[str, Any]:
    """What `best.json` holds: the proxy, its bits a layer with size and accuracy, and where it came from."""
    versions = {name: version(name) for name in ("tap-agent", "torch")} | {"quantizer": quantizer.VERSION}
    return {
        "thought": thought,
        "code": code,
        "networks": [
            {
                "network": row.network,
                "weight_bits": row.bits,
                "size_bytes": row.size_bytes,
                "bops": row.bops,
                "search": row.search.model_dump() if row.search else None,
                "test": row.test.model_dump(),
                "test_top1_by_calibration_draw": row.draws,
                "layers": [
                    {"name": layer.name, "params": layer.params, "weight_bits": weight, "activation_bits": activation}
                    for layer, weight, activation in zip(
                        each, row.allocation.allocation().weights, row.allocation.activations, strict=True
                    )
                ],
            }
            for row, each in zip([row for row in rows if row.kind == "proxy"], layers, strict=True)
            if row.allocation
        ],
        "provenance": provenance | {"versions": versions},
    }


def reads_text(result: Result) -> str:
    """How often the test split was read, and when."""
    if result.test_reads == 1:
        return "The test split was read once, after the search."
    return f"The test split was read {result.test_reads} times: each time that this table was begun, as after a limit."


def top1_text(found: MeasuredTop1) -> str:
    """Per cent with interval and count."""
    return f"{100 * found.top1:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f}, n = {found.count:,})"


def draws_text(row: Row) -> str:
    """Mean and standard deviation over calibration draws, in per cent."""
    if len(row.draws) < 2:
        return ""
    return f"{100 * sum(row.draws) / len(row.draws):.1f} ± {100 * row.spread:.1f}"


def summary(result: Result) -> str:
    """What happened, in a line."""
    living = [candidate for candidate in result.candidates if candidate.failure is None]
    whole = max((sum(candidate.images) for candidate in living), default=0) * len(living)
    share = sum(sum(candidate.images) for candidate in living) / (whole or 1)
    raced = f" measured on {share:.0%} of the images" if share < 1 else ""
    return (
        f"{len(result.candidates)} proposals, {len(living)} distinct and alive{raced}; "
        f"{result.measured} measurements; {f'{spent_text(result.spent)}; ' if result.spent else ''}"
        f"{result.seconds:.0f} s"
    )


def spent_text(spent: Spent) -> str:
    """Calls of language models, tokens and cost."""
    cost = "cost unknown" if spent.cost is None else f"${spent.cost:,.4f}" if spent.cost else "$0"
    return f"{spent.calls:,} model calls, {spent.tokens_in:,} tokens in, {spent.tokens_out:,} out, {cost}"
