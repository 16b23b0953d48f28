"""What a person sees in the terminal when a command has ended: tables, and results in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from agents.account import Spent
from tap_agent.course import glance
from tap_agent.folder import RunFolder
from tap_agent.result import MeasuredTop1, Result, Row

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def results_table(rows: Sequence[Row]) -> Table:
    """The final table, one line a row."""
    table = Table(title="Top-1 accuracy within the budget", title_justify="left")
    networks = len({row.network for row in rows}) > 1
    if networks:
        table.add_column("network")
    draws = max(len(row.draws) for row in rows)
    searched = any(row.search for row in rows)
    for name in ("allocation from", "bits", "KiB", *(["search"] if searched else []), "test (95 % interval)"):
        table.add_column(name, justify="left" if name == "allocation from" else "right")
    table.add_column(f"test, {draws} calibration draws", justify="right")
    for row in rows:
        note = f"\n[dim]{row.note}[/dim]" if row.note else ""
        cells = [f"{row.label}{note}", f"{row.bits:.2f}", f"{row.size_bytes / 1024:,.1f}"]
        if searched:
            cells.append(f"{100 * row.search.top1:.1f}" if row.search else "")
        cells += [top1_text(row.test), draws_text(row)]
        table.add_row(*([row.network] if networks else []), *cells, style="bold" if row.kind == "proxy" else "")
    return table


def runs_table(runs: Sequence[RunFolder]) -> Table:
    """One line a run: what it is, how far it has come, and what it achieved."""
    table = Table()
    for name in ("run", "network", "budget", "state", "fitness", "test"):
        table.add_column(name)
    for found in map(glance, runs):
        state = found.note or found.state
        if found.state in ("running", "interrupted"):
            state += f", {found.done} of {found.of} generations"
        fitness = f"{found.fitness:.4f}" if found.fitness is not None else ""
        tests = ", ".join(f"{100 * test:.1f} %" for test in found.tests)
        table.add_row(found.name, found.networks, found.budget, state, fitness, tests)
    return table


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
