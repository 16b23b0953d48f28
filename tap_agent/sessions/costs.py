"""What finding bits costs: the images that a rule looks at, how often, and for how long, over draws of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tap_agent.runs.folder import RunFolder
from tap_agent.sessions.apply import opening
from tap_agent.sessions.final_table import beside, seen_by_proxies
from tap_agent.sessions.place import Lines, Place, each_network
from tap_agent.sessions.resources import Resources
from tap_agent.sessions.rows import calibrated, named, proxy_subjects
from tap_agent.sessions.subject import ProxySubject
from tap_agent.settings.model import NetworkSettings, Settings
from tap_agent.tables import course
from tap_agent.tables.line import Figure, Kind, Line
from tap_agent.tables.plan import Planned, Variant
from tap_eval.allocation.budget import Budget
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BudgetMistake, ProxyMistake
from tap_eval.proxies.proxy import Rejection
from tools.evaluation import score


def costs(planned: Planned, place: Place) -> Lines:
    """Of each rule on every network, once for each seed, so that it computes all again."""
    subjects = proxy_subjects(planned.plan.proxies)
    runs = [RunFolder(path) for path in dict.fromkeys(map(Path, planned.plan.proxies)) if path.is_dir()]
    yield from each_network(planned, partial(_of_network, planned.plan.seeds, subjects, runs, place))


@dataclass
class _Cost:
    """What a rule costs, seed after seed."""

    kind: Kind
    sees: Sequence[str]
    notes: list[str] = field(default_factory=list)
    """of each seed that has one"""
    figures: dict[str, list[float]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    """why, of each seed under which it could not be measured"""

    def add(self, figures: dict[str, float]) -> None:
        """Of one more seed; what is nothing is not told."""
        for name, value in figures.items():
            if value:
                self.figures.setdefault(name, []).append(value)

    def told(self, seeds: int) -> str:
        """What is to be known of it after so many seeds."""
        counted = Counter(self.notes)
        told = [note if count == seeds else f"in {count} of {seeds}: {note}" for note, count in counted.items()]
        if self.failed:
            of = "" if len(self.failed) == seeds else f" in {len(self.failed)} of {seeds}"
            told.append(f"not measured{of}: {' '.join(dict.fromkeys(self.failed))}")
        return "; ".join(told) or ("" if self.figures else "looks at nothing")


def _of_network(
    seeds: int,
    subjects: Sequence[ProxySubject],
    runs: Sequence[RunFolder],
    place: Place,
    variant: Variant,
    network: NetworkSettings,
    settings: Settings,
) -> Lines:
    found: dict[tuple[str, str], _Cost] = {}
    for seed in range(settings.seed, settings.seed + seeds):
        its = settings.model_copy(update={"seed": seed, "calibration_draws": 1})
        with place.opened(opening(its, 1)) as resources:
            for budget in Budget.parse_all(network.budget or settings.budget):
                try:
                    _add(found, subjects, network, resources.benches[0].at(budget), resources, place)
                except BudgetMistake as mistake:
                    found.setdefault((budget.text, "ours"), _Cost("proxy", ())).failed.append(str(mistake))
            name = resources.benches[0].name
        done = seed - settings.seed + 1
        protocol = f"{done} draws of {calibrated(settings)}"
        yield [
            *(_line(cost, name, *key, variant.label, protocol, done) for key, cost in found.items()),
            *(_search(run, name, sum(each.name == run.name for each in runs) > 1) for run in runs),
        ]


def _add(
    found: dict[tuple[str, str], _Cost],
    subjects: Sequence[ProxySubject],
    network: NetworkSettings,
    bench: Bench,
    resources: Resources,
    place: Place,
) -> None:
    """What each rule costs at the budget of `bench`, beside what it did under other seeds."""
    budget, seed = bench.task.budget.text, resources.settings.seed
    for subject in subjects:
        label, note = named(subject, network)
        place.listener.begin(f"timing {label} on {bench.name}, seed {seed}")
        cost = found.setdefault((budget, label), _Cost("proxy", seen_by_proxies(bench)))
        cost.notes += filter(None, [note])
        try:
            cost.add(_proxy_cost(subject, bench, resources))
        except ProxyMistake as mistake:
            cost.failed.append(str(mistake))

    def left_out(sentence: str) -> None:
        label, _, why = sentence.partition(": ")
        found.setdefault((budget, label), _Cost("baseline", ())).failed.append(why)

    for entry in beside(
        bench,
        resources.settings,
        left_out,
        lambda label: place.listener.begin(f"timing {label} on {bench.name}, seed {seed}"),
    ):
        cost = found.setdefault((budget, entry.label), _Cost("baseline", entry.sees))
        cost.notes += filter(None, [entry.note])
        if entry.cost:
            rounding = bench.rounding_seconds if entry.cost.rounds else 0.0
            cost.add({**entry.cost.model_dump(exclude={"rounds"}), "rounding": rounding})


def _proxy_cost(subject: ProxySubject, bench: Bench, resources: Resources) -> dict[str, float]:
    """Images that its features are from, and seconds of computing them, of scoring and of allocating."""

    def timed() -> list[float]:
        for _ in range(2):  # the first time starts the sandbox
            found = score(subject.code, [bench], resources.sandbox)
        if isinstance(found, Rejection):
            raise ProxyMistake(f"{subject.origin} fails ({found.failure}): {found.message}")
        return [found.scoring_seconds, found.allocation_seconds]

    task = bench.task
    what = [
        subject.code,
        task.budget.text,
        repr(task.latencies),
        repr(task.choices),
        task.inputs,
        resources.settings.sandbox,
    ]
    scoring, allocating = bench.once(["proxy seconds", *what], timed).value
    images = len(bench.splits.calibrations[0]) if task.inputs == "statistics" else 0
    describing = bench.describing_seconds
    return {"images": images, "describing": describing, "scoring": scoring, "allocating": allocating}


def _line(cost: _Cost, network: str, budget: str, row: str, variant: str, protocol: str, seeds: int) -> Line:
    return Line(
        network=network,
        row=row,
        kind=cost.kind,
        budget=budget,
        variant=variant,
        sees=", ".join(cost.sees),
        figures={name: Figure(values=tuple(values)) for name, values in cost.figures.items()},
        protocol=protocol,
        note=cost.told(seeds),
    )


def _search(run: RunFolder, network: str, of_several: bool) -> Line:
    """What the search cost that found a proxy, by the record of its run; `of_several` of one name it has its path."""
    result = run.finished()
    figures = {
        "proposals": len(course.proposals(result.candidates)),
        "steps": len(result.generations) - 1,
        "search_seconds": result.seconds,
    }
    return Line(
        network=network,
        row=f"search of {run.path if of_several else run.name}",
        kind="search",
        figures={name: Figure(values=(value,)) for name, value in figures.items()},
        note=f"once, for every network that its proxy is applied to; {result.measured:,} measurements",
    )
