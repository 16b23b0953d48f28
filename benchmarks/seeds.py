"""Evolution against as many one-shot proposals, and against what is no proxy, over several seeds.

    PYTHONPATH=. python benchmarks/seeds.py configs/resnet20-cifar10.yaml --seeds 10 --out seeds.jsonl --budget 2.25bit

Each seed has a draw of calibration images of its own, on which two searches of the config are run, with and without
evolution: as it is, and with all proposals in the initial generation. Beside them stand an evolution of allocations
with as many measurements, the measured layer errors, uniform bits and random scores. Of each: the fitness of the
fittest, of searches; then mean KL divergence (nats) and top-1 of the network that is kept, on test images. What is in
the file is not done again, and one of other settings is refused; `--only evolution,one-shot` leaves the rest for later.
"evolution, racing" drops candidates at an error rate of 0.2, and is done where `--only` names it. The last lines
compare fitness in pairs (Wilcoxon, two-sided), and test KL; then the races: what searches that measured in full would
have saved, and what those that raced have.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import wilcoxon

from benchmarks.race import ERRORS, replayed
from graphs.search import Search
from graphs.state import Candidate, SearchState
from tap_agent.paths import cache_folder
from tap_agent.sessions.final_table import measurements
from tap_agent.sessions.record import versions
from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import Settings
from tap_agent.settings.read import read_settings
from tap_eval.baselines.baselines import baselines
from tap_eval.baselines.direct import direct
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import key
from tap_eval.proxies import features
from tap_eval.quantization.quantizer import Allocation

BESIDE = ("measured", "uniform", "random")
"""what the labels of those baselines begin with that stand beside"""
_VERSION = 2
"""raise it when a column comes to mean something else"""
_STEPS = 10_000
"""of a graph, far beyond any search"""
_RACING = "evolution, racing"
_ERROR = 0.2
"""the error rate of that column"""
Row = dict[str, Any]


def main() -> None:
    """Runs what is missing and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds, of which each is by itself")
    parser.add_argument("--out", type=Path, default=Path("seeds.jsonl"))
    parser.add_argument("--budget")
    parser.add_argument("--controller")
    parser.add_argument("--worth")
    parser.add_argument("--alpha", type=float)
    parser.add_argument("--device")
    parser.add_argument("--only", help="names of the table's columns, with commas between")
    chosen = parser.parse_args()
    flags = {name: getattr(chosen, name) for name in ("budget", "controller", "worth", "alpha", "device")}
    only = re.split(r",(?! )", chosen.only) if chosen.only else None
    rows: list[Row] = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    for seed in seeds:
        settings = read_settings(chosen.config, flags | {"seed": seed, "calibration_draws": 1})
        about = key(_VERSION, settings.model_dump(mode="json", exclude={"seed"}), versions(), features.VERSION)
        if any(row["about"] != about for row in rows):
            raise SystemExit(f"{chosen.out} holds rows of other settings or another version: name another --out.")
        there = {row["from"] for row in rows if row["seed"] == seed}
        for found in _missing(
            settings, lambda name, there=there: name not in there and (name in only if only else name != _RACING)
        ):
            rows.append({"seed": seed, "about": about, **found})
            with chosen.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    _tell([row for row in rows if row["seed"] in seeds])


def _missing(settings: Settings, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """What a seed comes to, one at a time."""
    searches = {
        "evolution": settings,
        _RACING: settings.model_copy(update={"racing": _ERROR}),
        "one-shot": settings.model_copy(update={"generations": 0, "population": settings.proposals}),
    }
    for name, its in searches.items():
        if wanted(name):
            with Resources(its, cache_folder()) as resources:
                state = _searched(resources)
                best = Candidate(**state["candidates"][state["best"] or ""])
                fitness = max(each["fitness"] for each in state["finalists"])
                row = _measured(resources.benches[0], [best.allocations[0].allocation()]) | _passes(state, resources)
            yield {"from": name, "fitness": fitness, "code": best.code, **row}
    with Resources(settings, cache_folder()) as resources:
        bench = resources.benches[0]
        for name, allocations in _others(bench, measurements(bench, settings), settings.seed).items():
            if wanted(name):
                yield {"from": name, **_measured(bench, allocations())}


def _others(bench: Bench, count: int, seed: int) -> dict[str, Callable[[], Sequence[Allocation]]]:
    """What is no proxy, by its name."""
    rules = {each.label: each.allocations for each in baselines(bench, seed)}
    return {"search over allocations": lambda: [direct(bench, count, seed).best]} | {
        name: lambda its=its: its  # type: ignore[misc]
        for name, its in rules.items()
        if name.startswith(BESIDE)
    }


def _searched(resources: Resources) -> SearchState:
    """The final state of a search that leaves no run."""
    ended: list[SearchState] = []
    with tempfile.TemporaryDirectory() as folder, resources.account(Path(folder) / "calls.sqlite") as account:
        search = Search(
            lambda: resources.proposer(account), resources.search_settings(), _nothing, ended.append, _nothing
        )
        search.graph().compile().invoke(
            {}, {"recursion_limit": _STEPS, "max_concurrency": resources.settings.population}
        )
    return ended[-1]


def _passes(state: SearchState, resources: Resources) -> Row:
    """The share of the image passes that a search had, or would have had by races at each of `ERRORS`, and whether
    these had found the same best."""
    candidates = [Candidate(**each) for each in state["candidates"].values()]
    benches, settings = resources.benchmark, resources.search_settings()
    if settings.racing:
        living = [each for each in candidates if each.failure is None]
        whole = len(living) * sum(bench.compared for bench in benches)
        return {"passes": sum(sum(each.images) for each in living) / whole}
    if not settings.generations:
        return {}
    return {"races": {str(error): replayed(candidates, benches, settings.fitness, error) for error in ERRORS}}


def _nothing(_: object) -> None:
    """Neither told nor on record."""


def _measured(bench: Bench, allocations: Sequence[Allocation]) -> Row:
    """KL and top-1 on test images, in their mean."""
    (found,) = bench.measure_all(allocations, "test", [0], kept=True)
    return {each: statistics.mean(getattr(one, each) for one in found) for each in ("kl", "top1")}


def _tell(rows: Sequence[Row]) -> None:
    names = sorted(dict.fromkeys(row["from"] for row in rows), key=lambda name: name != "evolution")
    print(f"| seed | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    by_seed = {
        seed: {row["from"]: row for row in rows if row["seed"] == seed} for seed in {row["seed"] for row in rows}
    }
    for seed, its in sorted(by_seed.items()):
        print(f"| {seed} | {' | '.join(cell([its[name]]) if name in its else '' for name in names)} |")
    print(f"| mean | {' | '.join(cell([row for row in rows if row['from'] == name]) for name in names)} |\n")
    others = names[1:] if names[:1] == ["evolution"] else []
    for other, what in [
        *((each, "fitness") for each in others if each in ("one-shot", _RACING)),
        *((each, "kl") for each in others),
    ]:
        sign = 1 if what == "fitness" else -1
        both = [its for its in by_seed.values() if {"evolution", other} <= its.keys()]
        ahead = [(its["evolution"][what] - its[other][what]) * sign for its in both]
        test = f", p = {wilcoxon(ahead).pvalue:.3f}" if len(ahead) > 1 and any(ahead) else ""
        better, worse = sum(each > 0 for each in ahead), sum(each < 0 for each in ahead)
        print(f"- evolution and {other}, by {what}: ahead in {better}, behind in {worse} of {len(ahead)}{test}")
    for error in map(str, ERRORS):
        if found := [row["races"][error] for row in rows if "races" in row]:
            share = statistics.mean(passes for _, passes in found)
            same = sum(kept for kept, _ in found)
            told = f"{share:.1%} of the image passes, the same best in {same} of {len(found)}"
            print(f"- raced at {error} after the fact: {told}")
    if raced := [row["passes"] for row in rows if "passes" in row]:
        print(f"- {_RACING}: {statistics.mean(raced):.1%} of the image passes")


def cell(rows: Sequence[Row]) -> str:
    """Fitness, KL and top-1 in per cent of some rows, each that they have: the mean, and the deviation of several."""
    found = []
    for what, scale, digits in (("fitness", 1, 4), ("kl", 1, 3), ("top1", 100, 1)):
        values = [scale * row[what] for row in rows if what in row]
        if values:
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            found.append(f"{statistics.mean(values):.{digits}f}{spread}")
    return ", ".join(found)


if __name__ == "__main__":
    main()
