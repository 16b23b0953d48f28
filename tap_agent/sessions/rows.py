"""Rows of a table that are allocations: full precision, proxies and baselines, measured as `apply` measures them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tap_agent.runs.result import Row
from tap_agent.sessions.apply import opening, own_entry
from tap_agent.sessions.final_table import Entry, beside, finish, full_precision, measured
from tap_agent.sessions.place import Lines, Place, each_network
from tap_agent.sessions.resources import Resources
from tap_agent.sessions.subject import ProxySubject, read_subject
from tap_agent.settings.fields import flagged
from tap_agent.settings.flag import BITS
from tap_agent.settings.model import NetworkSettings, Settings
from tap_agent.settings.read import read_settings
from tap_agent.tables.line import Figure, Line
from tap_agent.tables.plan import Planned, Variant
from tap_eval.allocation.budget import Budget
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.distilled import DISTILLED
from tap_eval.mistake import BudgetMistake, ProxyMistake
from tap_eval.proxies.published import FOUND_ON

_TOLD = {"bits", "activation_bits", "rounding", "finish", "pin_ends"}
"""settings of bits that a protocol names, whatever they are; others it names where they are not the usual"""


def allocations(planned: Planned, place: Place) -> Lines:
    """The rows of every variant, network and budget, under each draw of calibration images."""
    subjects = proxy_subjects(planned.plan.proxies)
    yield from each_network(planned, partial(_of_network, subjects, place))


def proxy_subjects(whats: Sequence[str]) -> list[ProxySubject]:
    """The proxies that these name, each once; those of runs of one name have their folders in their origin.

    Raises `ProxyMistake` where one names something else.
    """
    subjects = {path: _proxy_subject(path) for path in dict.fromkeys(str(Path(what)) for what in whats)}
    origins = Counter(subject.origin for subject in subjects.values())
    return [
        subject
        if origins[subject.origin] == 1
        else replace(subject, origin=f"{path}/{subject.origin.rpartition('/')[2]}")
        for path, subject in subjects.items()
    ]


def _proxy_subject(what: str) -> ProxySubject:
    subject = read_subject(what)
    if not isinstance(subject, ProxySubject):
        raise ProxyMistake(f"'{what}' is no proxy: give a run's folder, a proxy's .py file or a published proxy.")
    return subject


def named(subject: ProxySubject, network: NetworkSettings) -> tuple[str, str]:
    """What a proxy's row is called on a network, and what is to be known of it.

    TAP where it was found on this network, with these weights and images, TAP-C where it was found elsewhere and is
    applied unchanged; of a file that belongs to no run nobody knows. Of a published proxy the network's name alone is
    known.
    """
    if subject.given is not None:
        networks = read_settings(subject.given, {}).networks
        where = ", ".join(each.network for each in networks)
        same, this = any(_one(each) == _one(network) for each in networks), "this network"
    elif subject.origin in FOUND_ON:
        where = FOUND_ON[subject.origin] or "networks of its paper"
        same, this = where == network.network, "a network of this name"
    else:
        return f"proxy {subject.origin}", ""
    if same:
        return f"TAP ({subject.origin})", f"found on {this}, by a search that measured errors there"
    return f"TAP-C ({subject.origin})", f"found on {where}, applied unchanged"


def _one(network: NetworkSettings) -> tuple[object, ...]:
    """What makes it that network."""
    return network.network, network.weights, network.weights_entry, network.images


def _of_network(
    subjects: Sequence[ProxySubject], place: Place, variant: Variant, network: NetworkSettings, settings: Settings
) -> Lines:
    draws, lines = settings.calibration_draws, list[Line]()
    with place.opened(opening(settings, draws)) as resources:
        (bench,) = resources.benches
        full, protocol = full_precision(bench, search=False), _protocol(settings, bench)
        images = len(bench.splits.calibrations[0]) if settings.inputs == "statistics" else 0
        lines.append(_line(full, full, variant, protocol))
        yield lines
        for budget in Budget.parse_all(network.budget or settings.budget):
            at = {"network": bench.name, "budget": budget.text, "variant": variant.label}
            entries, absent = _entries(subjects, network, budget, resources, place)
            count = draws * sum(len(entry.allocations) for entry in entries)
            place.listener.begin(f"measuring {bench.name} at {budget.text}", count)
            finish(bench, entries, draws)
            for entry in entries:
                row = measured(entry, draws, search=False, advance=place.listener.advance)
                lines.append(_line(row, full, variant, protocol, images))
                yield lines
            lines += [line.model_copy(update=at) for line in absent]
            yield lines


def _entries(
    subjects: Sequence[ProxySubject], network: NetworkSettings, budget: Budget, resources: Resources, place: Place
) -> tuple[list[Entry], list[Line]]:
    """The proxies and baselines within a budget, and a line for each that cannot be had."""
    (bench,), listener = resources.benches, place.listener
    absent: list[Line] = []

    def left_out(sentence: str) -> None:
        row, _, why = sentence.partition(": ")
        absent.append(Line(network="", row=row, kind="baseline", note=f"not measured: {why}"))

    entries: list[Entry] = []
    try:
        here = bench.at(budget)
        for subject in subjects:
            label, note = named(subject, network)
            listener.begin(f"allocating bits of {bench.name} at {budget.text}: {label}")
            try:
                entry = own_entry(subject, bench, budget, resources)
                entries.append(replace(entry, label=label, note=note))
            except ProxyMistake as mistake:
                absent.append(Line(network="", row=label, kind="proxy", note=f"not measured: {mistake}"))
        entries += beside(
            here,
            resources.settings,
            left_out,
            lambda label: listener.begin(f"finding bits of {bench.name} at {budget.text}: {label}"),
        )
    except BudgetMistake as mistake:
        absent.append(Line(network="", row="ours", kind="proxy", note=f"not measured: {mistake}"))
    return entries, absent


def calibrated(settings: Settings) -> str:
    """The calibration images of a draw, with their source where that is not the images of the network."""
    (network,), count = settings.networks, settings.calibration_images
    if network.calibration is None:
        return f"{count} calibration images"
    if network.calibration == DISTILLED:
        return f"{count} distilled calibration images, which count as images"
    return f"{count} calibration images of {_source(network.calibration)}"


def _source(name: str) -> str:
    """An image source without the folders above its file."""
    kind, _, where = name.partition(":")
    return Path(where).name if where else kind


def _protocol(settings: Settings, bench: Bench) -> str:
    """How the rows of a network are measured, which is not always what the settings ask for."""
    done = {"sums": "int8" if bench.rounds_sums else "float"}
    ends = "held at the most bits" if settings.pin_ends else "in the allocation"
    others = "".join(
        f"{each.name.replace('_', ' ')} {value}, "
        for each in flagged("apply")
        if each.flag.panel == BITS and each.name not in _TOLD
        if (value := done.get(each.name, getattr(settings, each.name))) != each.field.default
    )
    draws = f"{settings.calibration_draws} draws of {calibrated(settings)}"
    told = (
        f"quantized after training, {draws}, "
        f"bits {{{', '.join(map(str, settings.bits))}}}, inputs {{{', '.join(map(str, settings.activation_bits))}}}, "
        f"rounding {settings.rounding}{', finished' if settings.finish else ''}, first and last layer {ends}, {others}"
        f"{len(bench.splits.test):,} test images of {_source(bench.splits.name)}"
    )
    return "; ".join([told, *bench.notes])


def _line(row: Row, full: Row, variant: Variant, protocol: str, images: int = 0) -> Line:
    """`images` are those that proxies see something of."""
    cost = row.cost.model_dump(exclude={"rounds"}) if row.cost else {"images": images if row.kind == "proxy" else 0}
    figures = {
        "top1": [100 * top1 for top1 in row.draws],
        "kl": row.kl_draws,
        "bits": [row.bits],
        "size": [row.size_bytes / 2**20],
        "smaller": [100 * (1 - row.size_bytes / full.size_bytes)],
        "bops": [row.bops / 1e9],
        **({} if row.latency_ms is None else {"latency": [row.latency_ms]}),
        **{name: [value] for name, value in cost.items() if value},
    }
    return Line(
        network=row.network,
        row=row.label,
        kind=row.kind,
        budget=row.budget,
        variant=variant.label,
        bits=_bits(row, variant.settings),
        sees=", ".join(row.sees),
        figures={name: Figure(values=tuple(values)) for name, values in figures.items()},
        protocol=protocol,
        note=row.note,
    )


def _bits(row: Row, settings: Settings) -> str:
    """Of weights and of inputs, as papers write it."""
    if row.kind == "full precision":
        return "32/32"
    if row.allocation is None:  # of several
        return "*/*" if len(settings.activation_bits) > 1 else f"*/{settings.activation_bits[0]}"
    both = row.allocation.weights, row.allocation.activations
    return "/".join(str(bits[0]) if len({*bits}) == 1 and len(str(bits[0])) == 1 else "*" for bits in both)
