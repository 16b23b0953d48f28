"""Which fitness ranks the proxies of a run as networks, budgets and images do that the run did not see.

    PYTHONPATH=. python benchmarks/fitness.py runs/RUN other.yaml ...

Each config names networks with their images and a budget. Every proxy that lived in the run is applied there,
unchanged, and what comes of it is measured on the config's search images; no test image is looked at. A row is a
fitness, by its worth and alpha: its rank correlation (Spearman) with the divergence there, over all proxies and over
the better half by that fitness; and by how much the divergence of the fittest exceeds that of the best proxy there.
Each is the mean over the configs' networks, which are in brackets.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import spearmanr

from graphs.state import Candidate
from tap_agent.paths import cache_folder
from tap_agent.runs.folder import RunFolder
from tap_agent.sessions.resources import Resources
from tap_agent.settings.read import read_settings
from tap_eval.measuring.bench import Bench
from tap_eval.proxies.fitness import FitnessWeights
from tap_eval.proxies.proxy import Rejection
from tools.evaluation import score
from tools.sandbox import Sandbox

ALPHAS = (0.0, 0.05, 0.1, 0.3, 1.0)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("others", type=Path, nargs="+")
    chosen = parser.parse_args()
    result = RunFolder(chosen.run).finished()
    living = [each for each in result.candidates if each.failure is None and not each.dropped]
    elsewhere: list[list[float]] = []
    for config in chosen.others:
        with Resources(read_settings(config, {}), cache_folder()) as resources:
            for bench in resources.benches:
                elsewhere.append([_divergence(each, bench, resources.sandbox) for each in living])
                print(
                    f"{bench.name} at {bench.task.budget.text}: KL {min(elsewhere[-1]):.4f} to {max(elsewhere[-1]):.4f}"
                )
    print(f"\n{len(living)} proxies\n\n| worth | alpha | rank correlation | of the better half | above the best |")
    print("|---|---|---|---|---|")
    for worth in ("accuracy", "kl"):
        for alpha in ALPHAS:
            weights = FitnessWeights(alpha, worth=worth)  # type: ignore[arg-type]
            values = [weights.offset(each.rho) + weights.worth_term(each.top1, each.kl) for each in living]
            cells = [_told([_agreement(values, there) for there in elsewhere])]
            cells.append(_told([_agreement(*_better(values, there)) for there in elsewhere]))
            cells.append(_told([there[values.index(max(values))] - min(there) for there in elsewhere], 4))
            print(f"| {worth} | {alpha} | {' | '.join(cells)} |")


def _divergence(candidate: Candidate, bench: Bench, sandbox: Sandbox) -> float:
    """Of what the proxy gives there; what fails there is infinitely far."""
    scored = score(candidate.code, [bench], sandbox)
    return math.inf if isinstance(scored, Rejection) else bench.measure(scored.allocations[0]).kl


def _agreement(values: Sequence[float], divergences: Sequence[float]) -> float:
    return float(spearmanr(values, [-each for each in divergences])[0])


def _better(values: Sequence[float], divergences: Sequence[float]) -> tuple[list[float], list[float]]:
    middle = statistics.median(values)
    kept = [place for place, value in enumerate(values) if value >= middle]
    return [values[place] for place in kept], [divergences[place] for place in kept]


def _told(found: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.mean(found):.{digits}f} ({', '.join(f'{each:.{digits}f}' for each in found)})"


if __name__ == "__main__":
    main()
