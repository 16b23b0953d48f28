"""What `apply` is told to apply: a proxy, the best one of a run, uniform bits, or the bits in an allocation file."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from tap_agent.runs.folder import RunFolder
from tap_agent.settings.model import Settings
from tap_eval.allocation.budget import most_uniform
from tap_eval.allocation.choices import uniform
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BitsMistake, BudgetMistake, Mistake
from tap_eval.quantization.quantizer import Allocation

KINDS = "a proxy's .py file, a run's folder, an allocation file (a run's best.json) or uniform:BITS"
LEAST, MOST = 2, 8
"""bits that a weight or an activation may have"""


class ProxyMistake(Mistake):
    """A proxy that cannot be read, or that does not run."""

    kind = "proxy"


class AllocationMistake(Mistake):
    """An allocation file that is none, or that is another network's."""

    kind = "proxy"


@dataclass(frozen=True)
class ProxySubject:
    """A proxy, where it came from, and the config of its run if that is known."""

    origin: str
    thought: str
    code: str
    config: Path | None


@dataclass(frozen=True)
class UniformSubject:
    """The same bits everywhere, or with None the most that a budget allows."""

    bits: int | None
    config: None = None

    @property
    def origin(self) -> str:
        """As it was written."""
        return f"uniform:{self.bits}" if self.bits else "uniform"

    def allocation(self, bench: Bench) -> Allocation:
        """For the network of `bench`, activations at their most; raises `BudgetMistake` where none is within budget."""
        activation, task = max(bench.task.choices.activations), bench.task
        if self.bits:
            return uniform(bench.layers, self.bits, activation)
        if found := most_uniform(bench.layers, activation, task.budget):
            return found
        raise BudgetMistake(f"{bench.name}: {LEAST} bits everywhere are above {task.budget.text}: raise the budget.")


class _Layer(BaseModel):
    name: str
    params: int
    weight_bits: int | tuple[int, ...]
    activation_bits: int

    @property
    def bits(self) -> set[int]:
        """Of its weights."""
        return {self.weight_bits} if isinstance(self.weight_bits, int) else set(self.weight_bits)


class _Network(BaseModel):
    network: str
    layers: tuple[_Layer, ...]


class _File(BaseModel):
    networks: tuple[_Network, ...]


@dataclass(frozen=True)
class FileSubject:
    """The bits that an allocation file gives to one or several networks."""

    path: Path
    networks: tuple[_Network, ...]
    config: Path | None

    @property
    def origin(self) -> str:
        """The file's path."""
        return str(self.path)

    def allocation(self, bench: Bench) -> Allocation:
        """For the network of `bench`, layers matched by name; raises `AllocationMistake` at the first that differs."""
        named = [each for each in self.networks if each.network == bench.name]
        found = named or (self.networks if len(self.networks) == 1 else ())
        if len(found) != 1:
            names = ", ".join(each.network for each in self.networks)
            raise AllocationMistake(f"{self.path} has bits for {names}, and not for one {bench.name}: {_NEXT}.")
        layers = {layer.name: layer for layer in found[0].layers}
        for layer in bench.layers:
            its = layers.get(layer.name)
            problem = ""
            if its is None:
                problem = f"has no layer {layer.name}"
            elif its.params != layer.params:
                problem = f"has {its.params:,} weights in layer {layer.name}, not {layer.params:,}"
            elif not isinstance(its.weight_bits, int) and len(its.weight_bits) != layer.out_channels:
                problem = f"has {len(its.weight_bits)} output channels in layer {layer.name}, not {layer.out_channels}"
            if problem:
                raise AllocationMistake(
                    f"{self.path} is not for {bench.name} but for {found[0].network}: it {problem}; {_NEXT}."
                )
        if further := layers.keys() - {layer.name for layer in bench.layers}:
            first = next(name for name in layers if name in further)
            raise AllocationMistake(
                f"{self.path} is not for {bench.name} but for {found[0].network}: it has a layer {first}; {_NEXT}."
            )
        own = [layers[layer.name] for layer in bench.layers]
        return Allocation(tuple(each.weight_bits for each in own), tuple(each.activation_bits for each in own))

    def offered(self, settings: Settings, asked: Collection[str]) -> Settings:
        """The settings, with the bits of the file among those that the baselines may take, where none were `asked` for.

        Weights may then have the bits of the settings and of the file, activations those of the file. Raises
        `BitsMistake` at the first layer whose bits are not among those that the settings were asked to offer.
        """
        layers = [layer for network in self.networks for layer in network.layers]
        weights = {bits for layer in layers for bits in layer.bits}
        activations = {layer.activation_bits for layer in layers}
        for layer in layers:
            for name, bits, offered in (
                ("bits", layer.bits, settings.bits),
                ("activation_bits", {layer.activation_bits}, settings.activation_bits),
            ):
                if name in asked and (beside := sorted(bits - set(offered))):
                    flag = f"--{name.replace('_', '-')}"
                    raise BitsMistake(
                        f"{self.path} gives layer {layer.name} {_listed(beside)} bits, which are not among {flag} "
                        f"{','.join(map(str, offered))}: offer them too, or leave out {flag}."
                    )
        widened = {} if "bits" in asked else {"bits": tuple(sorted(weights | set(settings.bits)))}
        if "activation_bits" not in asked:
            widened["activation_bits"] = tuple(sorted(activations))
        return settings.model_copy(update=widened)


_NEXT = "name the network that it was written for with --network and --weights, or allocate anew with its proxy"
Subject = ProxySubject | UniformSubject | FileSubject


def read_subject(what: str) -> Subject:
    """What `what` names, as `KINDS` has them; `uniform` alone is the most bits within a budget.

    Raises `ProxyMistake`, `AllocationMistake` or `BitsMistake`, and `RunMistake` of a run without a result.
    """
    if match := re.fullmatch(r"uniform(?::(.*))?", what, re.DOTALL):
        return UniformSubject(None if match[1] is None else _bits(what, match[1]))
    path = Path(what)
    if path.is_dir():
        folder = RunFolder(path)
        result = folder.finished()
        best = result.candidate(result.best)
        return ProxySubject(f"{folder.name}/{best.name}", best.thought, best.code, path / "config.yaml")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ProxyMistake(f"{path} is no proxy and no run: give {KINDS}.") from error
    if path.suffix == ".json" or text.lstrip().startswith("{"):
        return FileSubject(path, _networks(path, text), _beside(path.parent if path.name == "best.json" else None))
    return ProxySubject(str(path), "", text, _beside(path.parent.parent if path.parent.name == "proxies" else None))


def _bits(what: str, text: str) -> int:
    if not re.fullmatch("[0-9]", text) or not LEAST <= int(text) <= MOST:
        raise BitsMistake(
            f"'{what}' gives no bits that weights may have: write one whole number from {LEAST} to {MOST}, as in "
            "uniform:3, or uniform alone for the most that --budget allows."
        )
    return int(text)


def _beside(folder: Path | None) -> Path | None:
    """The config of the run in `folder`, if it is one."""
    config = folder and folder / "config.yaml"
    return config if config and config.is_file() else None


def _networks(path: Path, text: str) -> tuple[_Network, ...]:
    """What the file at `path` holds; raises `AllocationMistake`, and `BitsMistake` at the first that cannot be."""
    try:
        found = _File.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise AllocationMistake(
            f"{path} is no allocation file ({place and f'{place}: '}{problem['msg']}): give a run's best.json, or what "
            "`tap-agent apply --out FILE` wrote."
        ) from error
    for layer in (layer for network in found.networks for layer in network.layers):
        if wrong := sorted(bits for bits in layer.bits | {layer.activation_bits} if not LEAST <= bits <= MOST):
            raise BitsMistake(
                f"{path} gives layer {layer.name} {_listed(wrong)} bits: whole numbers from {LEAST} to {MOST} can be "
                "measured, so mend the file, or write it anew with `tap-agent apply --out FILE`."
            )
    return found.networks


def _listed(bits: Collection[int]) -> str:
    return " and ".join(map(str, bits))
