"""The report: one HTML file that holds everything it needs, made from a `Result` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from plotly.offline import get_plotlyjs

from tap_agent.report import curves, figures, layer_figures
from tap_agent.report.reuse import reusable, shipped
from tap_agent.report.text import (
    budget_text,
    chosen_text,
    draws_text,
    found_text,
    head_of_test,
    in_float_text,
    kl_text,
    more_bits_text,
    parts_text,
    reads_text,
    rest_text,
    summary,
    top1_text,
)
from tap_agent.runs.result import History, NetworkRecord, Result, Row


@cache
def template(name: str, *packages: str) -> Template:
    """The template NAME.html.jinja of `packages`, or of this one, in which a missing value is an error."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "tap_agent.report")]),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{name}.html.jinja")


def render(result: Result) -> str:
    """The page."""
    best = result.candidate(result.best)
    sections = figures.searching(result)
    for index in result.shown:
        sections += [curves.sizes(result, index), layer_figures.bits(result, best, index)]
    sections.append(
        figures.Section(
            "family", "Family tree of the best proxy", "Point at a proxy to read its thought.", figures.family(result)
        )
    )
    return template("report").render(
        result=result,
        best=best,
        summary=summary(result),
        sections=[(section.title, section.caption, _html(section.figure)) for section in sections],
        plotly=get_plotlyjs(),
        beside="",
        **shown(result),
    )


def shown(result: Result, folder: str = "") -> dict[str, Any]:
    """The numbers, the table and what is to be reused, as templates show them; `folder`, with its /, is the run's."""
    return {
        **_table(result.table),
        "left_out": result.left_out,
        "files": result.files,
        "unwritten": result.unwritten,
        "reads": reads_text(result),
        "chosen": chosen_text(result),
        "whole": all(network.sized_whole for network in result.networks),
        "draws": max(len(row.draws) for row in result.table),
        "headline": [_headline(result, network) for network in (result.networks[place] for place in result.shown)],
        "reusable": reusable(result, folder),
        "shipped": shipped(result),
    }


def render_rows(title: str, rows: Sequence[Row]) -> str:
    """A page with accuracy against size, a figure a network, and the table of the rows."""
    networks = dict.fromkeys(row.network for row in rows)
    drawn = {name: curves.curve([row for row in rows if row.network == name]) for name in networks}
    return template("curve").render(
        title=title,
        caption=curves.CAPTION,
        sections=[(name, _html(figure)) for name, figure in drawn.items()],
        plotly=get_plotlyjs(),
        **_table(rows),
    )


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    networks = {row.network for row in rows}
    head, counted = head_of_test(rows)
    return {
        "head": head,
        "left": any(row.in_float for row in rows),
        "timed": any(row.latency_ms is not None for row in rows),
        "in_float": in_float_text,
        "kl": kl_text,
        "found": found_text,
        "left_out": [],
        "rows": [(row, top1_text(row.test, count=counted), draws_text(row)) for row in rows],
        "several": len(networks) > 1,
        "budgets": len({(row.network, row.budget) for row in rows if row.budget}) > len(networks),
        "searched": any(row.search for row in rows),
        "plain": any(row.unfinished for row in rows),
        "draws": max(len(row.draws) for row in rows),
    }


def _headline(history: History, network: NetworkRecord) -> dict[str, Any]:
    rows = {row.kind: row for row in reversed(history.table) if row.network == network.name}
    proxy, full = rows["proxy"], rows["full precision"]
    return {
        "network": network.name,
        "rest": rest_text(network),
        "more": more_bits_text(history, network),
        "images": network.images if ":" not in network.images else Path(network.images).name,
        "top1": top1_text(proxy.test),
        "full": f"{100 * full.test.top1:.1f}",
        "size": f"{proxy.size_bytes / 1024:,.1f} KiB",
        "sized": "the packed network" if network.sized_whole else "of weights",
        "parts": parts_text(proxy),
        "full_size": f"{full.size_bytes / 1024:,.1f} KiB",
        "bits": f"{proxy.bits:.2f}",
        "budget": budget_text(network),
        "smaller": f"{math.floor(1000 * (1 - proxy.size_bytes / full.size_bytes)) / 10:.1f}",
    }


def _html(figure: go.Figure) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
