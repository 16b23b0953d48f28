"""Bits for a network that is at hand, without a search: allocated where needed, and measured (the paper's TAP-C)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from tap_agent.runs.result import Row
from tap_agent.sessions.final_table import Entry, beside, finish, full_precision, measured, seen_by_proxies
from tap_agent.sessions.record import Chosen, allocated, chosen, record
from tap_agent.sessions.resources import Resources
from tap_agent.sessions.subject import FileSubject, ProxySubject, Subject, UniformSubject
from tap_agent.settings.model import Settings
from tap_eval.allocation.budget import Budget, check_within, spent
from tap_eval.baselines.uniform import label_of
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BudgetMistake, ProxyMistake
from tap_eval.proxies.proxy import Rejection
from tap_eval.quantization.quantizer import Allocation
from tools.evaluation import Scored, score
from tools.toolbox import layer_table

_ANY = "8bit"
"""a budget that every network meets, to open it with"""


class Watch(Protocol):
    """Is told what goes on, and how much of it there is; then, by several threads, of each that is done."""

    def begin(self, doing: str, of: int | None = None) -> None:
        """Something begins that has `of` steps, as far as that is known."""
        ...

    def advance(self) -> None:
        """A step is done."""
        ...


@dataclass(frozen=True)
class Applied:
    """What came of it: rows of every network and budget, and what could not be shown."""

    rows: list[Row]
    refused: list[str]
    """sentences: of budgets that cannot be met, and of baselines that cannot be had at the size of what was given"""
    layers: list[str]
    """scores and bits of the layers, Markdown, one table a network; of a proxy at one budget"""
    seconds: tuple[float, float] | None
    """of scoring and of allocating, likewise"""
    chosen: list[Chosen]
    """what was given, one a network; of a single budget"""


@dataclass(frozen=True)
class _Point:
    """What was given, on one network and within one budget."""

    bench: Bench
    budget: Budget
    label: str
    allocation: Allocation
    scored: Scored | None = None


def opening(settings: Settings, draws: int) -> Settings:
    """The settings to open networks with that are then fitted to several budgets, and measured under `draws` draws.

    The images are those of a run with these settings, unless there are more draws than it has.
    """
    networks = tuple(network.model_copy(update={"budget": None}) for network in settings.networks)
    draws = max(settings.calibration_draws, draws)
    return settings.model_copy(update={"networks": networks, "budget": _ANY, "calibration_draws": draws})


def budgets(settings: Settings, text: str | None, subject: Subject) -> list[list[Budget]]:
    """The budgets of each network: those in `text`, divided by commas, or else the first of the settings.

    There are none for bits that are given, which have a size of their own. Raises `BudgetMistake` where one is none.
    """
    if text is not None:
        return [Budget.parse_all(text) for _ in settings.networks]
    if isinstance(subject, FileSubject) or (isinstance(subject, UniformSubject) and subject.bits):
        return [[] for _ in settings.networks]
    return [Budget.parse_all(network.budget or settings.budget)[:1] for network in settings.networks]


def check_single(asked: Sequence[Sequence[Budget]]) -> None:
    """Raises `BudgetMistake` where an allocation file would have to hold several allocations of a network."""
    for each in asked:
        if len(each) > 1:
            raise BudgetMistake(
                f"--out keeps the allocation of one budget, and {', '.join(budget.text for budget in each)} are "
                f"{len(each)}: give one of them with it, or keep the curve with --plot FILE."
            )


def apply(
    subject: Subject, asked: Sequence[Sequence[Budget]], resources: Resources, draws: int, watch: Watch
) -> Applied:
    """Scores, allocates, quantizes and measures on the test split, at the budgets `asked` of each network.

    Where none is asked, baselines get the size that the bits of `subject` take. A budget that cannot be met is left
    out when there are others. Raises `ProxyMistake` when the proxy fails, and `BudgetMistake` when nothing is left.
    """
    points: list[_Point] = []
    sentences: list[str] = []
    several = any(len(each) > 1 for each in asked)
    for bench, each in zip(resources.benches, asked, strict=True):
        if isinstance(subject, ProxySubject):
            watch.begin(f"describing the layers of {bench.name}")
            bench.features  # noqa: B018 which every budget shares
        for budget in each or (None,):
            watch.begin(f"allocating bits of {bench.name}{f' at {budget.text}' if budget else ''}")
            try:
                points.append(_point(subject, bench, budget, resources))
            except BudgetMistake as mistake:
                if not several:
                    raise
                sentences.append(str(mistake))
    if not points:
        raise BudgetMistake(sentences[0])
    entries: list[Entry] = []
    for point in points:
        own, others = _own(subject, point), []
        try:
            there = beside(
                point.bench.at(point.budget),
                resources.settings,
                sentences.append,
                lambda label, name=point.bench.name: watch.begin(f"finding bits of {name}: {label}"),  # type: ignore[misc]
            )
            others = [entry for entry in there if entry.label != own.label]
        except BudgetMistake as mistake:  # bits that are given need not be among the choices
            sentences.append(f"the baselines beside {subject.origin}: {mistake}")
        entries += [own, *others]
    rows = _measured(entries, draws, watch)
    if several:
        return Applied(rows, sentences, [], None, [])
    scored = [(point.bench, point.scored) for point in points if point.scored]
    seconds = sum(each.scoring_seconds for _, each in scored), sum(each.allocation_seconds for _, each in scored)
    return Applied(
        rows,
        sentences,
        [layer_table(bench, each, 0) for bench, each in scored],
        seconds if scored else None,
        chosen(rows, resources.benches),
    )


def own_entry(subject: Subject, bench: Bench, budget: Budget, resources: Resources) -> Entry:
    """What `subject` makes of a network within a budget, as a row that is to be measured; raises as `apply` does."""
    return _own(subject, _point(subject, bench, budget, resources))


def _point(subject: Subject, bench: Bench, budget: Budget | None, resources: Resources) -> _Point:
    """What `subject` makes of a network within a budget; bits that are given have one of their own."""
    match subject:
        case ProxySubject():
            assert budget
            found = score(subject.code, [bench.at(budget)], resources.sandbox)
            if isinstance(found, Rejection):
                raise ProxyMistake(f"{subject.origin} fails ({found.failure}): {found.message}")
            return _Point(bench, budget, subject.origin, found.allocations[0], found)
        case UniformSubject(bits=None):
            assert budget
            allocation = subject.allocation(bench.at(budget))
            return _Point(bench, budget, label_of(allocation), allocation)
        case _:
            allocation = subject.allocation(bench)
            label = label_of(allocation) if isinstance(subject, UniformSubject) else subject.origin
            return _Point(bench, _checked(subject, allocation, bench, budget), label, allocation)


def _own(subject: Subject, point: _Point) -> Entry:
    choices = point.bench.task.choices.weights
    uncommon = isinstance(subject, UniformSubject) and point.allocation.weights[0] not in choices
    note = "these bits are not among the choices" if uncommon else ""
    sees = seen_by_proxies(point.bench) if isinstance(subject, ProxySubject) else ()
    return Entry(point.bench, point.budget.text, point.label, "proxy", note, (point.allocation,), sees)


def _checked(subject: Subject, allocation: Allocation, bench: Bench, budget: Budget | None) -> Budget:
    """The budget, which `allocation` must be within, or without one the size of its weights."""
    if budget:
        try:
            check_within(allocation, bench.layers, bench.beside(budget))
        except BudgetMistake as mistake:
            raise BudgetMistake(
                f"{bench.name}: {subject.origin} does not fit: {str(mistake).removesuffix('.')}; raise it, or leave "
                "out --budget to compare at the size that it takes."
            ) from mistake
        return budget
    bits = Fraction(spent(allocation, bench.layers, Budget.parse(_ANY)), sum(layer.params for layer in bench.layers))
    return Budget(f"{float(bits):.4g}bit", "bit", bits)


def _measured(entries: Sequence[Entry], draws: int, watch: Watch) -> list[Row]:
    """Full precision once a network, then its entries."""
    benches = {entry.bench.name: entry.bench for entry in entries}
    watch.begin("measuring on the test split", len(benches) + draws * sum(len(entry.allocations) for entry in entries))
    rows = []
    for name, bench in benches.items():
        rows.append(full_precision(bench, search=False))
        watch.advance()
        own = [entry for entry in entries if entry.bench.name == name]
        finish(bench, own, draws)
        rows += [measured(entry, draws, search=False, advance=watch.advance) for entry in own]
    return rows


def allocation_record(subject: Subject, applied: Applied, settings: Settings) -> dict[str, Any]:
    """What an allocation file holds of it; the `settings` are those that networks were opened with."""
    what = "proxy" if isinstance(subject, ProxySubject) else "allocation"
    provenance = {what: subject.origin, "at": time.strftime("%Y-%m-%d"), "seed": settings.seed}
    thought, code = (subject.thought, subject.code) if isinstance(subject, ProxySubject) else ("", "")
    networks = [allocated(each, scales=True) for each in applied.chosen]
    return record(thought, code, networks, settings, provenance)
