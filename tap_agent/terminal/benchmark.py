"""The table of what foretells measured allocations."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from tap_agent.sessions.benchmark import Held
from tap_eval.benchmark.benchmark import Benchmark
from tap_eval.benchmark.correlation import Interval


def held_table(against: Benchmark, held: Sequence[Held]) -> Table:
    """A row a rule, the best first."""
    about = against.about
    sizes = f"{len(against.entries)} allocations of {about.network} in {len(about.edges) - 1} ranges of size"
    table = Table(
        title=f"{sizes}, {about.edges[0]:g} to {about.edges[-1]:g} bits a weight, {about.count:,} images",
        caption="95 % intervals of a bootstrap over allocations; within: mean over ranges of size",
    )
    table.add_column("rule", overflow="fold")
    for name in (
        "Spearman, KL, within", "Kendall, KL, within", "Spearman, KL, overall", "Kendall, KL, overall",
        "Spearman, top-1, within",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for each in held:
        kl = each.kl
        figures = (kl.spearman, kl.kendall, kl.overall_spearman, kl.overall_kendall, each.top1.spearman)
        table.add_row(each.name, *map(_shown, figures))
    return table


def _shown(figure: Interval) -> str:
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"
