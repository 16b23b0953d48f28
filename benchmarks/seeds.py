"""Evolution against the same number of one-shot proposals, over several seeds of `tap-agent run`.

    python benchmarks/seeds.py configs/resnet20-cifar10.yaml --seeds 5

Each seed is run twice, with the config as it is and with all proposals in the initial
generation, on the same draw of calibration images. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from tap_agent.runs.folder import RunFolder
from tap_agent.settings.read import read_settings


def main() -> None:
    """Runs what is missing and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--racing", metavar="ERROR", help="a third column: evolution that races with this error rate")
    chosen, flags = parser.parse_known_args()
    settings = read_settings(chosen.config, {})
    proposals = settings.population * (settings.generations + 1)
    modes = {
        "evolution": [],
        "one-shot": ["--generations", "0", "--population", str(proposals)],
    }
    if chosen.racing:
        modes["racing"] = ["--racing", chosen.racing]
    print(f"| seed | {' | '.join(f'{mode}: fitness, search, test' for mode in modes)} | measured layer error, test |")
    print("|---|" + "---|" * (len(modes) + 1))
    columns: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in modes}
    errors: list[float] = []
    for seed in range(chosen.seeds):
        cells = []
        for mode, extra in modes.items():
            run = chosen.out / f"{mode}-{seed}"
            if not (run / "result.json").exists():
                start = ["resume", str(run)] if run.exists() else ["run", "--config", str(chosen.config)]
                more = [] if run.exists() else [*flags, *extra, "--seed", str(seed), "--draws", "1", "--out", str(run)]
                subprocess.run([sys.executable, "-m", "tap_agent", *start, *more], check=True, stdout=sys.stderr)
            result = RunFolder(run).result()
            assert result is not None
            rows = {row.label if row.kind == "baseline" else row.kind: row for row in result.table}
            proxy = rows["proxy"]
            assert proxy.search is not None
            found = (result.candidate(result.best).value, 100 * proxy.search.top1, 100 * proxy.test.top1)
            columns[mode].append(found)
            cells.append(f"{found[0]:.4f}, {found[1]:.1f}, {found[2]:.1f}")
        errors.append(100 * rows["measured layer error"].test.top1)
        print(f"| {seed} | {' | '.join(cells)} | {errors[-1]:.1f} |", flush=True)
    means = [", ".join(_mean([row[place] for row in rows], place) for place in range(3)) for rows in columns.values()]
    print(f"| mean | {' | '.join(means)} | {_mean(errors, 1)} |")


def _mean(values: list[float], place: int) -> str:
    digits = 4 if place == 0 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
