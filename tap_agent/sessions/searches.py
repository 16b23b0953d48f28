"""Rows of a table that are whole searches, each a run in a folder of its own that goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import re
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from agents.account import LimitMistake
from agents.chat import ModelMistake
from agents.models import REPLAY
from graphs.state import Candidate
from tap_agent.runs.folder import RunFolder
from tap_agent.runs.mending import check_calls, mend
from tap_agent.runs.progress import of_events
from tap_agent.runs.result import Result
from tap_agent.sessions.outcome import NoProxyMistake
from tap_agent.sessions.place import Lines, Place, each_network
from tap_agent.sessions.record import versions
from tap_agent.sessions.rows import calibrated
from tap_agent.sessions.search import search
from tap_agent.settings.fields import of_a_session
from tap_agent.settings.model import NetworkSettings, Settings
from tap_agent.tables import course
from tap_agent.tables.line import Figure, Line, failed
from tap_agent.tables.plan import Planned, Variant
from tap_eval.measuring.ledger import key
from tap_eval.mistake import BudgetMistake
from tap_eval.proxies import features
from tap_eval.quantization import finishing


@dataclass
class _Searches:
    """Those of one variant on one network, a seed after the other."""

    variant: str
    network: NetworkSettings
    settings: Settings
    results: list[Result] = field(default_factory=list)
    came_to_nothing: list[str] = field(default_factory=list)
    """a sentence about each that has no result"""
    dead: list[list[Candidate]] = field(default_factory=list)
    """the candidates of each in which none lived"""
    line: Line | None = None
    """what they have come to so far"""

    @property
    def courses(self) -> list[list[course.Proposal]]:
        """How each went, those that have a result first."""
        return [course.course(its) for its in (*(result.candidates for result in self.results), *self.dead)]


def searches(planned: Planned, place: Place) -> Lines:
    """What the searches of each variant came to, over seeds, each with calibration images of its own."""
    groups: list[_Searches] = []
    contents: dict[str, str] = {}
    for lines in each_network(planned, partial(_of_network, planned.plan.seeds, place, contents, groups)):
        yield [_compared(line, groups, planned.against) for line in lines]


def _of_network(
    seeds: int,
    place: Place,
    contents: dict[str, str],
    groups: list[_Searches],
    variant: Variant,
    network: NetworkSettings,
    settings: Settings,
) -> Lines:
    group = _Searches(variant.label, network, settings)
    groups.append(group)
    for seed in range(settings.seed, settings.seed + seeds):
        its = settings.model_copy(update={"seed": seed, "baselines": ()})
        doing = ", ".join(filter(None, [variant.label, f"seed {seed}"]))
        place.listener.begin(f"searching on {network.network}: {doing}", its.proposals)
        try:
            where = _opened_with(settings)
            if where not in contents:
                contents[where] = _content(settings, place)
            path = _path(its, variant.label, contents[where], place)
            try:
                group.results.append(_searched(path, its, place))
            except (NoProxyMistake, LimitMistake):
                group.dead.append(of_events(RunFolder(path).events()).candidates)
                raise
        except (NoProxyMistake, LimitMistake, ModelMistake, BudgetMistake) as mistake:
            group.came_to_nothing.append(str(mistake))
            if isinstance(mistake, (ModelMistake, BudgetMistake)):  # which any other seed would meet too
                break
        group.line = _line(group, seeds)
        yield [group.line]
    group.line = _line(group, seeds)
    yield [group.line]


def _opened_with(settings: Settings) -> str:
    """Names a network and images by what `_content` opens them with."""
    return settings.model_dump_json(include={"networks", "calibration_images", "calibration_draws", "seed"})


def _content(settings: Settings, place: Place) -> str:
    """Names a network with its images, so that no run is taken for one of other weights or images."""
    with place.opened(settings) as resources:
        (bench,) = resources.benches
        splits, latencies = bench.splits, bench.task.latencies
        images = [each.digest for each in (*splits.calibrations, splits.search, splits.test)]
        return key(bench.digest, *images, *([latencies.content] if latencies else []))


def _path(settings: Settings, label: str, content: str, place: Place) -> Path:
    """Where a run is kept."""
    words = [label, settings.networks[0].network, f"seed-{settings.seed}", _depends(settings, content)[:8]]
    return place.folder / re.sub(r"[^\w.-]+", "-", "-".join(filter(None, words)))


def _searched(path: Path, settings: Settings, place: Place) -> Result:
    """The result of the run at `path`, which is begun, or goes on, unless it has ended."""
    if path.exists() and not (path / "config.yaml").exists():  # it was interrupted while it was made
        shutil.rmtree(path)
    folder = RunFolder(path) if path.exists() else None
    if folder:
        with folder.held():
            for sentence in mend(folder):
                place.tell(sentence)
            result = folder.result()
        if result and result.stopped is None:
            return result
    with place.opened(settings) as resources:
        resources.check()
        folder = folder or RunFolder.create(path, settings)
        with folder.held():
            check_calls(folder)
            return search(folder, resources, partial(_listen, place), brief=True)


def _depends(settings: Settings, content: str) -> str:
    """Names what a search depends on, with the content of the files that its settings name, and versions.

    The device is of it, though a run may go on with another: figures differ by it.
    """
    figured = settings.model_dump(mode="json", exclude=of_a_session() - {"device"})
    files = [settings.given, Path(settings.llm.removeprefix(REPLAY)) if settings.llm.startswith(REPLAY) else None]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file and file.is_file()]
    return key(content, figured, digests, versions(), finishing.VERSION, features.VERSION)


def _listen(place: Place, event: dict[str, Any]) -> None:
    if event["event"] == "proposed" and not event.get("draft_of"):
        place.listener.advance()


def _line(group: _Searches, seeds: int) -> Line:
    """What the searches so far came to."""
    settings, results = group.settings, group.results
    courses = group.courses[: len(results)]
    rows = [next(row for row in result.table if row.kind == "proxy") for result in results]
    found: dict[str, list[float | None]] = {
        "top1": [100 * statistics.mean(row.draws) for row in rows],
        "kl": [statistics.mean(row.kl_draws) for row in rows],
        "fitness": [course.best(each) for each in courses],
        "bits": [row.bits for row in rows],
        "size": [row.size_bytes / 2**20 for row in rows],
        "proposals": [len(each) for each in courses],
        "gain": [course.gain(each) for each in courses],
        "gained": [None if (share := course.gained(each)) is None else 100 * share for each in courses],
        "within": [course.within(each) for each in courses],
    }
    shares = [course.not_executable(its) for its in (*(result.candidates for result in results), *group.dead)]
    for generation in sorted({each for its in shares for each in its}):
        found[failed(f"generation {generation}")] = [100 * its[generation] for its in shares if generation in its]
    notes = [f"{len(results)} of {seeds} seeds"] if len(results) < seeds else []
    notes += dict.fromkeys(group.came_to_nothing)
    notes += dict.fromkeys(result.stopped for result in results if result.stopped)
    return Line(
        network=group.network.network,
        row="TAP, searched",
        kind="search",
        budget=settings.networks[0].budget or settings.budget,
        variant=group.variant,
        figures=_figures(found),
        protocol=(
            f"{seeds} searches of {settings.generations + 1} generations of {settings.population}, {settings.llm}, "
            f"worth {settings.worth.partition(':')[0]}, alpha {settings.alpha:g}, "
            f"{calibrated(settings)}, each seed's own"
        ),
        note="; ".join(notes),
    )


def _compared(line: Line, groups: Sequence[_Searches], against: str | None) -> Line:
    """With the proposals until the mean best fitness of the variant `against`, and with changes beside it.

    A line that no group of searches came to stays as it is.
    """
    group = next((each for each in groups if each.line is line), None)
    if group is None:
        return line
    reference = next((each for each in groups if (each.variant, each.network) == (against, group.network)), None)
    if reference is None or not reference.results or not group.results:
        return line
    its, others = group.courses, reference.courses
    goal = statistics.mean(course.best(each) for each in others[: len(reference.results)])
    until = [course.until(each, goal, group.settings.proposals) for each in its]
    found: dict[str, list[float | None]] = {
        "until": [*until],
        "reached": [sum(course.best(each) >= goal for each in its)],
    }
    spreads = [spread for each in others if (spread := course.within(each)) is not None]
    if group is not reference:
        beside = statistics.mean(course.until(each, goal, reference.settings.proposals) for each in others)
        found["until_change"] = [_change(each, beside) for each in until]
        mean = statistics.mean(spreads) if spreads else 0.0
        found["within_change"] = [_change(course.within(each), mean) for each in its]
    return line.model_copy(update={"figures": line.figures | _figures(found)})


def _change(value: float | None, beside: float) -> float | None:
    """In per cent."""
    return None if value is None or not beside else 100 * (value / beside - 1)


def _figures(found: dict[str, list[float | None]]) -> dict[str, Figure]:
    """Of seeds of which there is something to tell."""
    known = {name: tuple(value for value in values if value is not None) for name, values in found.items()}
    return {name: Figure(values=values) for name, values in known.items() if values}
