"""What one agent is asked for: a template, what it may see of the search so far, and where it stands among others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prompts import render
from tap_eval.proxies.proxy import Proxy
from tools.evaluation import Measured


@dataclass(frozen=True)
class Parent:
    """A judged proxy as an agent is shown it; the lists hold one entry a network."""

    name: str
    proxy: Proxy
    fitness: float
    top1: Sequence[float]
    kl: Sequence[float]
    counts: Sequence[int]
    """images on which both were measured"""
    rho: Sequence[float]
    bits: Sequence[Sequence[float]]
    """average weight bits a layer"""
    foretelling: Sequence[float] = ()
    """in place of `top1`, `kl` and `counts`, see `tools.evaluation.Measured`"""

    @property
    def measured(self) -> Measured:
        """What it achieves."""
        lists = tuple(self.rho), tuple(self.top1), tuple(self.kl)
        return Measured(*lists, sum(self.counts), 0.0, tuple(self.foretelling))


@dataclass(frozen=True)
class Outcome:
    """A proxy that was tried, and what came of it, in a line; figures are means over networks."""

    name: str
    template: str
    thought: str
    fitness: float | None = None
    top1: float | None = None
    kl: float | None = None
    """nats"""
    kls: Sequence[float] = ()
    """the same on each network, where there are several"""
    rho: float = 0.0
    failure: str | None = None
    parents: Mapping[str, float] = field(default_factory=dict)
    """the KL of each, by its name, or what else `by` is"""
    foretelling: float | None = None
    """in place of accuracy and KL"""
    by: Literal["KL", "foretelling"] = "KL"


@dataclass(frozen=True)
class Assignment:
    """The template and its bounded context."""

    template: str
    parents: tuple[Parent, ...]
    library: tuple[Outcome, ...]
    """the best proxies"""
    failures: tuple[str, ...]
    """the latest failures, in a sentence each"""
    seed: int
    name: str = ""
    """of the candidate that is asked for"""
    tried: tuple[tuple[Outcome, ...], ...] = ()
    """for each parent, what was made of it before"""
    place: int = 1
    """from 1, among the `siblings` that are asked for the same at the same time"""
    siblings: int = 1
    emphasis: str = ""
    """one of `prompts.emphases.EMPHASES`; none is the agent's own choice"""
    notebook: tuple[str, ...] = ()
    """lessons of earlier generations"""
    judged: Mapping[str, float] = field(default_factory=dict)
    """the fitness of each expression so far, of a small model"""

    def question(self, networks: Sequence[str]) -> str:
        """The assignment in words, on `networks` of these names: first what a whole generation is told."""
        tried = self.tried or ((),) * len(self.parents)
        parents = [
            render(
                "parent",
                parent=parent,
                tried=outcomes,
                networks=[
                    {
                        "name": network,
                        "told": parent.measured.told(place),
                        "count": parent.counts[place] if parent.counts else 0,
                        "bits": [round(b, 1) for b in bits],
                    }
                    for place, (network, bits) in enumerate(zip(networks, parent.bits, strict=True))
                ],
            )
            for parent, outcomes in zip(self.parents, tried, strict=True)
        ]
        return render(
            "question",
            notebook=self.notebook,
            library=self.library,
            failures=self.failures,
            task=render(self.template, parents=parents, library=self.library),
            place=self.place,
            siblings=self.siblings,
            emphasis=self.emphasis,
        )
