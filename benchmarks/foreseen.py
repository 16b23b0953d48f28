"""How well a search foresees the fitness of a small model's expressions, by what.

    tap-agent run --config CONFIG --generations 0 --population 48 --out runs/once
    PYTHONPATH=. python benchmarks/foreseen.py runs/once

The proposals of each run in the order of their names: the first are judged, and of the others fitness is foreseen. A
row is a number of judged ones, and what is made use of: the layer errors, added up (`agents.prior`), what was judged
(`agents.forecast` with a prior that says nothing), or both, as a search does. Spearman's coefficient with the measured
fitness, over all others and over the best half of them; means over the runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from agents.forecast import Forecast
from agents.prior import Powers, Prior
from prompts.expression import exponents
from prompts.grammar import expression_of
from tap_agent.paths import cache_folder
from tap_agent.runs.folder import RunFolder
from tap_agent.sessions.resources import Resources

_JUDGED = (0, 8, 24)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    rows: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for path in parser.parse_args().runs:
        folder = RunFolder(path)
        with Resources(folder.settings(), cache_folder()) as resources:
            benches, weights = resources.benchmark, resources.search_settings().fitness
            prior = Prior(benches, weights)
            layers = [bench.features for bench in benches]
            found = {
                expression: each.value
                for each in folder.finished().candidates
                if each.failure is None and (expression := expression_of(each.code))
            }
            for count in (each for each in _JUDGED if each < len(found) // 2):
                judged = dict(list(found.items())[:count])
                others = {each: value for each, value in found.items() if each not in judged}
                if not count:
                    _note(rows, count, "layer errors", prior([exponents(each) for each in others]), others)
                    continue
                for name, used in (("judged", _nothing), ("both", prior)):
                    order = Forecast(layers, used).promising(list(others), judged, len(others))
                    _note(rows, count, name, np.array([-order.index(each) for each in others]), others)
    print("| judged | foreseen by | all others | the best half |\n|---|---|---|---|")
    for (count, name), results in rows.items():
        cells = [f"{statistics.mean(column):.2f}" for column in zip(*results, strict=True)]
        print(f"| {count} | {name} | {' | '.join(cells)} |")


def _nothing(expressions: Sequence[Powers]) -> np.ndarray:
    return np.zeros(len(expressions))


def _note(
    rows: dict[tuple[int, str], list[tuple[float, float]]],
    count: int,
    name: str,
    foreseen: np.ndarray,
    others: dict[str, float],
) -> None:
    values = np.array(list(others.values()))
    best = np.argsort(-values)[: len(values) // 2]
    agreement = spearmanr(foreseen, values)[0], spearmanr(foreseen[best], values[best])[0]
    rows.setdefault((count, name), []).append((float(agreement[0]), float(agreement[1])))


if __name__ == "__main__":
    main()
