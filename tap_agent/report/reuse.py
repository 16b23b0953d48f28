"""Proxies to take to another network: the best few of a run that differ, and those that ship with the program."""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import dataclass

from graphs.population import ranked
from graphs.state import Candidate
from tap_agent.report.figures import kib
from tap_agent.runs.result import Result
from tap_agent.settings.model import Settings
from tap_eval.allocation.budget import Budget
from tap_eval.proxies.fitness import novelty
from tap_eval.proxies.published import NAMES, published

_MOST = 3
"""proxies of a run"""
_APART = 0.1
"""least novelty beside those already taken: at a rank correlation of 0.9 two say much the same of the layers"""
_LONGEST = 160  # characters of a thought


@dataclass(frozen=True)
class Reusable:
    """A proxy, and how it is applied."""

    name: str
    line: str
    """what it thinks, in a line"""
    figures: str
    """what it was worth in the run; "" where it was not measured there"""
    command: str
    thought: str
    code: str


def reusable(result: Result, folder: str = "") -> list[Reusable]:
    """The best of a run that differ in how they rank layers, the best first; `folder`, with its /, is the run's."""
    taken: list[Candidate] = []
    for each in (result.candidate(result.best), *ranked(result.everyone)):
        apart = novelty(each.scores, [other.scores for other in taken]) if each.scores else 0.0
        if len(taken) < _MOST and not each.dropped and (apart >= _APART or not taken):
            taken.append(each)
    return [
        Reusable(
            name=each.name,
            line=_line(each.thought),
            figures=_figures(result, each),
            command=_command(result, f"{folder}proxies/{each.name}.py"),
            thought=each.thought,
            code=each.code,
        )
        for each in taken
    ]


def shipped(result: Result) -> list[Reusable]:
    """Those that come with the program, which the run did not measure."""
    pairs = [(name, published(name)) for name in NAMES]
    return [Reusable(name, _line(proxy.thought), "", _command(result, name), "", proxy.code) for name, proxy in pairs]


def _line(thought: str) -> str:
    """Its first paragraph, cut to about a line."""
    return textwrap.shorten(thought.strip().split("\n\n", 1)[0], _LONGEST, placeholder=" …")


def _figures(result: Result, each: Candidate) -> str:
    shown = result.shown
    top1 = ", ".join(f"{100 * each.top1[place]:.1f}" for place in shown if each.top1)
    kl = ", ".join(f"{each.kl[place]:.3f} nats" for place in shown if each.kl)
    foretelling = ", ".join(f"{each.foretelling[place]:.2f}" for place in shown if each.foretelling)
    found = f"foretelling {foretelling}" if foretelling else f"top-1 on the search split {top1} %"
    rho = ", ".join(f"{each.rho[place]:.2f}" for place in shown)
    sizes = ", ".join(f"{kib(each, place, result.networks[place]):,.1f}" for place in shown)
    return (
        f"fitness {each.value:.4f}; {found} {f'and KL {kl} ' if kl else ''}in {sizes} KiB; "
        f"rank correlation with the layer errors {rho}"
    )


def _command(result: Result, what: str) -> str:
    """With a budget that is about weights of any network, and bits to choose from that are not the usual ones."""
    words = ["tap-agent", "apply", what, "--network", "NETWORK"]
    budget, bits = result.networks[0].budget, result.config["bits"]
    if Budget.parse(budget).unit in ("bit", "%"):
        words += ["--budget", budget]
    if tuple(bits) != Settings.model_fields["bits"].default:
        words += ["--bits", ",".join(map(str, bits))]
    return shlex.join(words)
