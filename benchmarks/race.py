"""What a race would have saved in runs that measured every candidate in full, and whether it keeps the best.

    python benchmarks/race.py runs/seeds/evolution-*

The proposals of each run are raced again, generation by generation, with what the ledger holds
of them (what it lacks is measured). A search that races proposes other candidates later on,
since its controller sees estimates for the dropped; that is not replayed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from graphs import population
from graphs.state import Candidate
from tap_agent.paths import cache_folder
from tap_agent.runs.folder import RunFolder
from tap_agent.sessions.resources import Resources
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.race import Entrant, Seen, image_sets, race
from tap_eval.measuring.stages import STAGES
from tap_eval.proxies.fitness import FitnessWeights

ERRORS = (0.02, 0.1, 0.2, 0.5)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    folders = [RunFolder(path) for path in parser.parse_args().runs]
    found: dict[float, list[tuple[bool, float]]] = {error: [] for error in ERRORS}
    for folder in folders:
        with Resources(folder.settings(), cache_folder()) as resources:
            for error in ERRORS:
                found[error].append(
                    replayed(_candidates(folder), resources.benchmark, resources.search_settings().fitness, error)
                )
    print("| error rate | same best proxy | share of the image passes | from, to |\n|---|---|---|---|")
    for error, results in found.items():
        shares = [share for _, share in results]
        same = sum(kept for kept, _ in results)
        print(
            f"| {error} | {same} of {len(results)} | {statistics.mean(shares):.3f} "
            f"| {min(shares):.2f}, {max(shares):.2f} |"
        )


def _candidates(folder: RunFolder) -> list[Candidate]:
    result = folder.result()
    if result is None:
        raise SystemExit(f"{folder.path} has not ended.")
    if folder.settings().given:
        raise SystemExit(f"{folder.path} was judged by what was measured before, and raced nothing.")
    return result.candidates


def replayed(
    candidates: Sequence[Candidate], benches: Sequence[Bench], weights: FitnessWeights, error: float
) -> tuple[bool, float]:
    """Whether the best of those that were measured in full wins a race at that error rate, for which share of the
    image passes."""
    finished: dict[str, tuple[float, Entrant]] = {}
    seen = everything = 0
    for generation in sorted({candidate.generation for candidate in candidates}):
        living = [each for each in candidates if each.generation == generation and each.failure is None]
        entrants = [Entrant(each.value - weights.worth_term(each.top1, each.kl)) for each in living]

        def measure(which: Sequence[int], stage: int, living: Sequence[Candidate] = tuple(living)) -> list[Seen]:
            pairs = [list(zip(benches, living[index].allocations, strict=True)) for index in which]
            return [[bench.seen(bits.allocation(), stage) for bench, bits in each] for each in pairs]

        rivals = sorted(finished.values(), key=lambda pair: pair[0], reverse=True)[: population.LEAST]
        sizes = [[len(bench.stages[stage]) for bench in benches] for stage in range(len(STAGES))]
        sets, share = image_sets([bench.splits.search for bench in benches]), weights.share
        race(entrants, [rival for _, rival in rivals], measure, sizes, sets, 1, error, share, weights.worth)
        for candidate, entrant in zip(living, entrants, strict=True):
            seen += sum(map(len, entrant.so_far()))
            everything += sum(bench.compared for bench in benches)
            if not entrant.dropped:
                finished[candidate.name] = (candidate.value, entrant)
    best = max(finished, key=lambda name: (finished[name][0], name))
    return best == population.best(candidates), seen / everything


if __name__ == "__main__":
    main()
