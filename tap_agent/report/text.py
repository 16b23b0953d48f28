"""Results in words, as the report, the terminal and the page have them."""

from __future__ import annotations

from collections.abc import Sequence

from agents.account import Spent
from tap_agent.runs.result import History, MeasuredTop1, NetworkRecord, Result, Row
from tap_eval.allocation.budget import Budget

_PARTS = {
    "weights": "weights",
    "scales": "scales",
    "biases": "biases",
    "inputs": "scales and zero points of inputs",
    "channel_bits": "bits of channels",
    "rest": "float32 that no layer holds",
}


def reads_text(result: Result) -> str:
    """How often the test split was read, and when."""
    if result.test_reads == 1:
        return "The test split was read once, after the search."
    return f"The test split was read {result.test_reads} times: each time that this table was begun, as after a limit."


def top1_text(found: MeasuredTop1, *, count: bool = True) -> str:
    """Per cent with interval, and count if asked for."""
    images = f", n = {found.count:,}" if count else ""
    return f"{100 * found.top1:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f}{images})"


def head_of_test(rows: Sequence[Row]) -> tuple[str, bool]:
    """Above a column of test accuracies, and whether the count of images is for each row to tell."""
    counts = {row.test.count for row in rows}
    return (f"test (95 %, n = {counts.pop():,})", False) if len(counts) == 1 else ("test (95 % interval)", True)


def chosen_text(result: Result) -> str:
    """Among which the best was chosen, and by how much; "" where there was nothing to choose from."""
    if len(result.finalists) < 2:
        return ""
    first, *others = result.finalists
    apart = ", ".join(f"{each.name} {-each.behind:+.4f} ± {each.error:.4f}" for each in others)
    fittest = max(result.finalists, key=lambda each: each.fitness)
    how = "was kept" if fittest is first else f"was taken in place of {fittest.name}, the fittest before,"
    draws = " and calibration draws" if max(len(row.draws) for row in result.table) > 1 else ""
    return (
        f"{first.name} {how} among the best {len(result.finalists)} by images{draws} that the search did not use. "
        f"There others' fitness is {apart} from its own; the fittest goes unless one is ahead by more than its error."
    )


def kl_text(found: MeasuredTop1) -> str:
    """Mean KL divergence from full precision in nats; "" where it was not measured."""
    return "" if found.kl is None else f"{found.kl:.3f}"


def draws_text(row: Row) -> str:
    """Mean and standard deviation over calibration draws, in per cent."""
    if len(row.draws) < 2:
        return ""
    return f"{100 * sum(row.draws) / len(row.draws):.1f} ± {100 * row.spread:.1f}"


def found_text(row: Row) -> str:
    """What its bits were found from: images looked at, how often, and in what time; "" where it is not told."""
    cost, parts = row.cost, []
    if cost and cost.images:
        parts.append(f"{cost.images:,} images")
    if cost and cost.steps:
        parts.append(f"{cost.steps:,} {'step' if cost.steps == 1 else 'steps'}")
    if cost and cost.seconds:
        parts.append(f"{cost.seconds:.2g} s" if cost.seconds < 10 else f"{cost.seconds:,.0f} s")
    return f"sees {', '.join(row.sees)}{': ' if parts else ''}{', '.join(parts)}" if row.sees else ""


def in_float_text(share: float) -> str:
    """The share of a network's weights that stay in float32, in per cent."""
    return f"{100 * share:.1f} %"


def parts_text(row: Row) -> str:
    """What a row's size is made of, in KiB, in the order of a packed file; "" where it is not told."""
    parts = [f"{_PARTS[name]} {size / 1024:,.2f}" for name, size in row.parts.items() if size]
    return f"{', '.join(parts)} KiB" if parts else ""


def more_bits_text(history: History, network: NetworkRecord) -> str:
    """What the next larger budget of the curve would buy, and the next smaller one cost; "" where there is no curve."""
    table = [row for row in history.table if row.network == network.name and row.kind == "proxy"]
    curve = [row for row in history.curve if row.network == network.name and row.kind == "proxy"]
    if not table or not curve:
        return ""
    own = table[0].bits
    more = min((row for row in curve if row.bits > own), key=lambda row: row.bits, default=None)
    less = max((row for row in curve if row.bits < own), key=lambda row: row.bits, default=None)
    said = [f"{top1_text(row.test)} in {row.size_bytes / 1024:,.1f} KiB at {row.budget}" for row in (more, less) if row]
    return f"The same proxy gives {', and '.join(said)}." if said else ""


def sizes_text(rows: Sequence[Row]) -> str:
    """What the sizes of a table count, with the parts of each network's proxy; "" where they are not told."""
    proxies = [row for row in rows if row.kind == "proxy" and row.parts]
    if not proxies:
        return ""
    return "; ".join(["Sizes are of the whole packed network", *(f"{row.label}: {parts_text(row)}" for row in proxies)])


def budget_text(network: NetworkRecord) -> str:
    """The budget with what it limits, where that is known."""
    return f"{network.budget} ({Budget.parse(network.budget).about})" if network.sized_whole else network.budget


def rest_text(network: NetworkRecord) -> str:
    """What of a network is not quantized, in a sentence; "" where everything is."""
    found = []
    if network.in_float:
        largest = sorted(network.in_float_bytes.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{reader} {size / 1024:,.1f}" for reader, size in largest)
        found.append(
            f"{in_float_text(network.in_float)} of its weights stay in float32, "
            f"{sum(network.in_float_bytes.values()) / 1024:,.1f} KiB by what reads them: {parts}."
        )
    if network.unused_bytes:
        found.append(f"{network.unused_bytes / 1024:,.1f} KiB of weights are never used, and are not counted.")
    return " ".join(found)


def summary(result: Result) -> str:
    """What happened, in a line."""
    living = [candidate for candidate in result.candidates if candidate.failure is None]
    drafts = sum(candidate.draft_of is not None for candidate in result.candidates)
    beside = f" and {drafts} draft{'s' if drafts > 1 else ''}" if drafts else ""
    whole = max((sum(candidate.images) for candidate in living), default=0) * len(living)
    share = sum(sum(candidate.images) for candidate in living) / whole if whole else 1
    raced = f" measured on {share:.0%} of the images" if share < 1 else ""
    return (
        f"{len(result.candidates) - drafts} proposals{beside}, {len(living)} distinct and alive{raced}; "
        f"{result.measured} measurements; {f'{spent_text(result.spent)}; ' if result.spent else ''}"
        f"{result.seconds:.0f} s"
    )


def spent_text(spent: Spent) -> str:
    """Calls of language models, tokens and cost."""
    cost = "cost unknown" if spent.cost is None else f"${spent.cost:,.4f}" if spent.cost else "$0"
    return f"{spent.calls:,} model calls, {spent.tokens_in:,} tokens in, {spent.tokens_out:,} out, {cost}"
