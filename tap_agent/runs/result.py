"""The result of a run, as `result.json` holds it and as the report shows it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from agents.account import Spent
from graphs.state import Bits, Candidate, Generation
from graphs.winner import Finalist


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class MeasuredTop1(_Record):
    """Top-1 with its count and 95 % Wilson interval, shares in [0, 1]; and how far outputs are from full precision."""

    correct: int
    count: int
    top1: float
    low: float
    high: float
    kl: float | None = None
    """mean KL divergence over the images, nats; None in results of before it was measured"""


class RowCost(_Record):
    """What a baseline looked at to find its bits, as `tap_eval.baselines.rule.Cost` has it."""

    images: int
    steps: int
    seconds: float
    rounds: bool = False


class Row(_Record):
    """One line of the final table: an allocation of one network, or the mean of several."""

    label: str
    kind: Literal["full precision", "proxy", "baseline"]
    """`proxy` is whatever the table is about, be it uniform bits or an allocation file"""
    network: str
    budget: str = ""
    """within which bits were allocated; "" in full precision, and in results of before it was kept"""
    note: str = ""
    sees: tuple[str, ...] = ()
    """what its bits were found from; nothing in results of before this was told"""
    cost: RowCost | None = None
    """of finding them; None in full precision, of what the table is about, and in results of before this was told"""
    bits: float
    """average weight bits"""
    size_bytes: int
    """of the whole network, packed; in results of before parts were told, of the layers' weights alone"""
    parts: dict[str, int] = {}
    """bytes of each part by name, as in `tap_eval.allocation.size.Size`; none for the mean of several allocations"""
    in_float: float = 0.0
    """share of the network's weights that no layer holds and that stay in float32, in [0, 1]"""
    bops: int
    latency_ms: float | None = None
    """an image, the sum of the layers'; None where that is not known"""
    allocation: Bits | None = None
    search: MeasuredTop1 | None
    test: MeasuredTop1
    unfinished: MeasuredTop1 | None = None
    """test top-1 as the search rounds it, where networks are rounded once more; `test` is of the one that is kept"""
    draws: list[float]
    """test top-1 under each calibration draw, with the same bits; the first is `test`"""
    spread: float
    """standard deviation over `draws`"""
    kl_draws: list[float] = []
    """mean KL divergence likewise, nats; none in results of before it was kept"""


class LayerRecord(_Record):
    """What the report needs of a layer."""

    name: str
    kind: str
    params: int
    macs: int
    out_channels: int = 0
    """0 in results of before sizes were those of the whole network"""


class NetworkRecord(_Record):
    """One network of the benchmark set."""

    name: str
    searched_only: bool = False
    """whether candidates are measured on it and no table has it: another budget of a network that has one"""
    images: str
    budget: str
    layers: list[LayerRecord]
    layer_errors: list[float]
    """nats, at the lowest bit choice"""
    in_float: float = 0.0
    """as in `Row`"""
    in_float_bytes: dict[str, int] = {}
    """those weights, by what reads them"""
    sums: int = 0
    """values between layers that are rounded in a range of their own"""
    sums_of_inputs: tuple[int, ...] = ()
    """of the others, the layer whose input has the same; none in results of before these were told"""
    unused_bytes: int = 0
    """weights that nothing reads"""

    @property
    def sized_whole(self) -> bool:
        """Whether sizes are of the whole packed network; they once were of the layers' weights alone."""
        return all(layer.out_channels for layer in self.layers)


class ModelFile(_Record):
    """A quantized network in the run's folder, for other software to run."""

    name: str
    network: str
    size_bytes: int
    sha256: str


class History(_Record):
    """How a search went, or how far it has come: what figures are drawn from."""

    networks: list[NetworkRecord]
    generations: list[Generation]
    candidates: list[Candidate]
    refinements: list[Candidate] = []
    """what conversations made of them, after the search"""
    best: str | None
    """of the search; None while no candidate lives"""
    notebook: list[str] = []
    """lessons that the language model drew, of the search; small models draw none"""
    table: list[Row] = []
    left_out: list[str] = []
    """baselines that were asked for and that a network cannot have, a sentence each"""
    curve: list[Row] = []
    """the best proxy, uniform bits and measured layer error at other budgets, on the test split; results of before \
this was measured have none"""

    @property
    def shown(self) -> list[int]:
        """Places of the networks that tables and figures are about."""
        return [place for place, network in enumerate(self.networks) if not network.searched_only]

    @property
    def everyone(self) -> list[Candidate]:
        """Every candidate, of the search and of conversations."""
        return [*self.candidates, *self.refinements]

    def candidate(self, name: str) -> Candidate:
        """The candidate called `name`."""
        return next(candidate for candidate in self.everyone if candidate.name == name)


class Result(History):
    """A search that has ended: everything that a report shows."""

    run: str
    config: dict[str, Any]
    finalists: list[Finalist] = []
    """those among which `best` was chosen, best first; results of before there was such a choice have none"""
    seconds: float
    spent: Spent | None = None
    """on language models; None in results of before this was counted"""
    stopped: str | None = None
    """the limit that stopped the search early, in a sentence"""
    files: list[ModelFile] = []
    """what it left of its best allocation; results of before there were such have none"""
    unwritten: list[str] = []
    """why there is no file of a network, a sentence each"""
    test_reads: int = 1
    """times that the table was measured on the test split: more than once where a limit stopped the search before"""
    measured: int
    """allocations and layer errors that had to be measured; the rest was recalled"""
    best: str
