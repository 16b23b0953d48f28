"""What flows through the search graph: plain JSON, and the records that it is made of.

Records are pydantic models in the code and dicts in the state, which holds nothing that a
checkpoint or an HTTP answer could not carry.
"""

from __future__ import annotations

import math
import operator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from tap_eval.quantization.quantizer import Allocation

Template = Literal["initialization", "mutation", "crossover"]
TEMPLATES: tuple[Template, ...] = ("initialization", "mutation", "crossover")


class Bits(BaseModel):
    """An allocation as JSON: bits a layer, or a string with a digit for each of its output channels."""

    model_config = ConfigDict(frozen=True)
    weights: list[int | str]
    activations: list[int]

    @staticmethod
    def of(allocation: Allocation) -> Bits:
        """The record of `allocation`."""
        weights = [bits if isinstance(bits, int) else "".join(map(str, bits)) for bits in allocation.weights]
        return Bits(weights=weights, activations=list(allocation.activations))

    def allocation(self) -> Allocation:
        """The allocation that this records."""
        weights = tuple(bits if isinstance(bits, int) else tuple(map(int, bits)) for bits in self.weights)
        return Allocation(weights, tuple(self.activations))

    def means(self) -> list[float]:
        """Average weight bits of each layer."""
        return [bits if isinstance(bits, int) else sum(map(int, bits)) / len(bits) for bits in self.weights]


def by_proposal(name: str) -> tuple[str, int, str]:
    """Sorts names of candidates in the order of proposal, p999 before p1000, and drafts behind what they are of."""
    return name[:1], int("".join(filter(str.isdigit, name)) or 0), name


class Candidate(BaseModel):
    """One proposal, alive or dead; lists of lists hold one entry a network of the benchmark set."""

    model_config = ConfigDict(frozen=True)
    name: str
    """p000, p001, ... in the order of proposal; p000a, ... are drafts of p000; c000, ... in that of conversations"""
    generation: int
    template: Template | Literal["refinement"]
    """who made it: an agent of the search, or a person in a conversation"""
    parents: list[str]
    thought: str
    code: str
    failure: str | None = None
    """one of `tap_eval.proxies.proxy.Failure`, or None for a judged candidate"""
    message: str = ""
    scores: list[list[float]] = []
    """of layers; those of channels in their mean"""
    prints: list[str] = []
    """what tells it from others, see `tools.evaluation.Scored`"""
    bits: list[list[float]] = []
    """average weight bits of each layer"""
    allocations: list[Bits] = []
    """in full; the state leaves them out, for they name every channel, and has `bits`"""
    rho: list[float] = []
    top1: list[float] = []
    """accuracy on the search split, in [0, 1]"""
    kl: list[float] = []
    """mean KL divergence (nats) of the outputs from full precision, likewise; older results have none"""
    foretelling: list[float] = []
    """how well `scores` foretell what was measured before, in place of both; see `tools.evaluation.foretellings`"""
    images: list[int] = []
    """of the search split, on which both were measured"""
    dropped: bool = False
    """whether it was dropped from the race: `images` are not all, and its fitness is an estimate"""
    fitness: float | None = None
    """Eq. 6; None stands for minus infinity"""
    seconds: float = 0.0
    llm: str = ""
    """the language model that proposed it"""
    tokens: int = 0
    rounds: int = 1
    """proposals that the agent made before this one was taken, or given up"""
    draft_of: str | None = None
    """the proposal on the way to which its agent measured this one"""

    @property
    def value(self) -> float:
        """Fitness as a number that can be compared."""
        return -math.inf if self.fitness is None else self.fitness


class Generation(BaseModel):
    """What the judge concluded: probabilities are those that the generation was drawn with."""

    model_config = ConfigDict(frozen=True)
    index: int
    probabilities: dict[Template, float]
    offspring: dict[Template, int]
    failures: dict[str, int]
    best: float | None
    mean: float | None
    population: list[str]


def _union(known: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Adds by name, so that an offspring that runs twice after a crash counts once."""
    return known | new


class SearchState(TypedDict):
    """The state of a search; every value is plain JSON."""

    generation: int
    """the generation being made; 0 is the initial population"""
    weights: dict[str, float]
    """the controller's weights of the templates"""
    candidates: Annotated[dict[str, dict[str, Any]], _union]
    """every `Candidate` ever proposed, by name"""
    population: list[str]
    library: list[str]
    """the context library: names of the best proxies, which the agents are shown"""
    plan: list[dict[str, Any]]
    """the offspring of the generation: name, template, parents"""
    generations: Annotated[list[dict[str, Any]], operator.add]
    """a `Generation` each, in order"""
    best: str | None
    """the fittest so far; in the end the winner among `finalists`"""
    finalists: list[dict[str, Any]]
    """a `graphs.winner.Finalist` each, the winner first; none before the end"""
    notebook: list[str]
    """lessons of the generations so far, a line each; states of before there were such lack it"""


class SearchInput(TypedDict):
    """What a search begins with: nothing, for it follows from its settings."""
