"""The parts of a run, put together from its settings; each is opened when it is first used."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from fractions import Fraction
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch

from agents.account import Account, Limits
from agents.chat import ModelMistake
from agents.models import Models, parse, priced
from agents.proposer import Proposer
from graphs.search import SearchSettings
from tap_agent.settings.model import NetworkSettings, Settings
from tap_eval.allocation.budget import Budget, spent
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.allocation.latency import Latencies
from tap_eval.benchmark.benchmark import Benchmark, read
from tap_eval.device import CPU, DeviceMistake, chosen, found
from tap_eval.images.images import room_in
from tap_eval.images.sources import open_source, split
from tap_eval.kept import Kept
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.cluster import RayExecutor
from tap_eval.measuring.devices import spread_over
from tap_eval.measuring.distilled import DISTILLED, DistilledDraws, calibrated_on
from tap_eval.measuring.job import Measures
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.measurer import Measurer
from tap_eval.measuring.progress import Advance, silent
from tap_eval.measuring.recipe import Bounds
from tap_eval.measuring.task import Task
from tap_eval.mistake import BenchmarkMistake
from tap_eval.networks.load import load_network
from tap_eval.proxies.fitness import FitnessWeights, Worth
from tap_eval.storage import writing
from tools.sandbox import MontySandbox, Sandbox, SandboxError
from tools.toolbox import allowance_for

_BESIDE = Fraction(6, 5)
"""the second budget of a search, by the first"""


class Resources(AbstractContextManager["Resources"]):
    """The benchmark set, the sandbox and the agents that `settings` describe; closes what it opened."""

    def __init__(self, settings: Settings, cache: Path) -> None:
        self.settings = settings
        self.cache = cache
        self._held = ExitStack()
        self.watch: Advance = silent
        """is told of what takes long"""
        self.stopping = threading.Event()
        """set once no call of a language model is to begin"""
        self._opening = threading.RLock()

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @cached_property
    def ledger(self) -> Ledger:
        """Every measurement so far, of this run and of others."""
        return Ledger(self.cache / "measurements.sqlite")

    @cached_property
    def benches(self) -> list[Bench]:
        """Every network with its images; raises a `Mistake` that names what does not fit."""
        networks = self.settings.networks
        return [self.bench(network, name) for network, name in zip(networks, names_of(networks), strict=True)]

    @cached_property
    def benchmark(self) -> list[Bench]:
        """What candidates are measured on: `benches`, then these at further budgets, which no table counts.

        Where they are judged by what was measured before, the one network that this is of; raises `BenchmarkMistake`.
        """
        further: list[Bench] = []
        for bench, network in zip(self.benches, self.settings.networks, strict=True):
            budgets = Budget.parse_all(network.budget or self.settings.budget)[1:]
            if not budgets and self.settings.second_budget and not self.given:
                budgets = second(bench)
            further += [bench.at(budget, f"{bench.name} at {budget.text}") for budget in budgets]
        if self.given:
            if len(self.benches) + len(further) > 1:
                names = ", ".join(each.name for each in (*self.benches, *further))
                raise BenchmarkMistake(
                    "--worth benchmark:FILE judges scores by allocations of one network, whatever the budget, and this "
                    f"run has {names}: give one, with one --budget."
                )
            self.given.check_of(self.benches[0])
            self.benches[0].foretelling = self.given.foretelling
        return [*self.benches, *further]

    @cached_property
    def given(self) -> Benchmark | None:
        """The measured allocations by which candidates are judged; raises `BenchmarkMistake`."""
        return read(self.settings.given) if self.settings.given else None

    def bench(self, network: NetworkSettings, name: str) -> Bench:
        """A network with its images, under the settings of the run; raises a `Mistake` that names what does not fit."""
        settings, device = self.settings, self.devices[0]
        choices = Choices(settings.bits, settings.activation_bits, settings.pin_ends, settings.channel_groups)
        task = Task(
            choices,
            Budget.parse_all(network.budget or settings.budget)[0],
            settings.inputs,
            settings.rounding,
            settings.finish,
            settings.sums,
            settings.activation_ranges,
            settings.attention_activations,
            Latencies.read(network.latencies) if network.latencies else None,
        )
        loaded = load_network(network.network, network.weights, self.cache, network.weights_entry)
        notes = loaded.notes
        if loaded.transform and not network.transform:
            notes += (f"{name} gets images as its weights want them: {loaded.transform}",)
        made = network.calibration == DISTILLED
        splits = split(
            open_source(network.images, network.classes),
            calibration=open_source(network.calibration, network.classes) if network.calibration and not made else None,
            seed=settings.seed,
            draws=settings.calibration_draws,
            count=settings.calibration_images,
            search=network.search,
            test=network.test,
            transform=network.transform or loaded.transform,
            room=room_in(self.cache, settings.images_mib * 2**20),
            network=loaded.network,
        )
        advance: Advance = lambda what, done, of: self.watch(what, done, of)  # noqa: E731 which is set later
        if made:
            draws = DistilledDraws(
                loaded.network, splits.search, settings.calibration_images, settings.calibration_draws, settings.seed,
                Kept(self.cache / "distilled"), network.output, advance,
            )  # fmt: skip
            splits = calibrated_on(splits, draws)
        bounds = Bounds(
            settings.batch, settings.packed_mib * 2**20, settings.features_mib * 2**20, settings.moments_mib * 2**20
        )
        return Bench(
            name, loaded.network, splits, task, self.ledger, bounds, spread=self._spread, output=network.output,
            notes=notes, advance=advance, device=device,
        )  # fmt: skip

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        """Where networks are to be, each on all of them; raises `DeviceMistake`."""
        device = self.settings.device
        if self.settings.executor == "local":
            return chosen(device, found())
        if device not in ("auto", "cpu"):
            raise DeviceMistake(
                f"--device {device}: the workers of a Ray cluster measure on CPUs: leave it out, or take --executor "
                "local."
            )
        return (CPU,)

    @cached_property
    def _spread(self) -> Callable[[Measurer], Measures]:
        """Brings a network to where it is measured; raises `ExecutorMistake`."""
        if self.settings.executor == "local":
            return spread_over(self.devices)
        return self._held.enter_context(RayExecutor(self.settings.address)).spread

    @cached_property
    def sandbox(self) -> Sandbox:
        """Where candidates run; raises `SandboxError` when it cannot."""
        if self.settings.sandbox == "e2b":
            if find_spec("e2b_code_interpreter") is None:
                raise SandboxError("the client of E2B is not installed: `pip install -e '.[e2b]'` brings it.")
            from tools.e2b import E2BSandbox

            return self._held.enter_context(E2BSandbox())
        with writing(Path(tempfile.gettempdir()), "make room there, or point TMPDIR at a folder that takes files"):
            return self._held.enter_context(MontySandbox())

    @cached_property
    def models(self) -> Models:
        """The language models that the agents share; raises `ModelMistake`."""
        settings = self.settings
        asking = {"seconds": settings.call_seconds, "tokens": settings.answer_tokens, "leave_out": settings.leave_out}
        return parse(settings.llm, settings.base_url, temperature=settings.temperature, **asking)

    def check(self) -> None:
        """Opens every part; raises a `Mistake` that names what does not fit."""
        self.models.check()
        prices = priced(self.models, self.settings.prices)
        if self.settings.max_cost is not None:
            for model in self.models.members:
                if model.spec not in prices:
                    raise ModelMistake(
                        f"--max-cost {self.settings.max_cost:g} needs the price of {model.spec}: write "
                        f'`prices: {{"{model.spec}": [USD_IN, USD_OUT]}}` into the config, for a million tokens in '
                        "and a million out."
                    )
        self.open()

    def open(self) -> None:
        """Opens what proxies are run and measured with."""
        with self._opening:
            self.benchmark  # noqa: B018
            self.sandbox  # noqa: B018

    def account(self, path: Path, seconds: Callable[[], float] = float) -> Account:
        """The account in the file at `path`, of a run that has taken so many `seconds`."""
        settings = self.settings
        return Account(
            path,
            Limits(settings.max_cost, settings.max_calls, settings.max_minutes),
            priced(self.models, settings.prices),
            seconds,
            Ledger(self.cache / "answers.sqlite") if settings.cache_llm else None,
            self.stopping,
        )

    def proposer(self, account: Account) -> Proposer:
        """The agents, over all of the above."""
        self.open()
        settings, fitness = self.settings, self.search_settings().fitness
        allowance = allowance_for(self.benchmark) if settings.allowance is None else settings.allowance
        return Proposer(
            self.models, self.benchmark, self.sandbox, settings.rounds, allowance, account=account, fitness=fitness,
            seed=settings.seed,
        )  # fmt: skip

    def search_settings(self) -> SearchSettings:
        """What steers the search."""
        settings = self.settings
        worth = cast("Worth", settings.worth.partition(":")[0])
        return SearchSettings(
            population=settings.population,
            generations=settings.generations,
            controller=settings.controller,
            fitness=FitnessWeights(settings.alpha, settings.beta, settings.gamma, worth),
            racing=settings.racing,
            seed=settings.seed,
        )


def names_of(networks: Sequence[NetworkSettings]) -> list[str]:
    """Of their benches: each network's own, and a number behind it for a further one of that name."""
    found: list[str] = []
    for place, network in enumerate(networks):
        same = sum(other.network == network.network for other in networks[:place])
        found.append(f"{network.network} ({same + 1})" if same else network.network)
    return found


def second(bench: Bench) -> list[Budget]:
    """A budget beside a network's own, a fifth above it, or below it where that would leave nothing to decide."""
    own, choices = bench.task.budget, bench.task.choices
    most = uniform(bench.layers, max(choices.weights), max(choices.activations))
    for factor in (_BESIDE, 1 / _BESIDE):
        budget = bench.beside(own.times(factor))
        least = sum(budget.cost(layer, *budget.options(layer, choices)[0]) for layer in bench.layers)
        if least < budget.limit(bench.layers) < spent(most, bench.layers, budget):
            return [budget]
    return []
