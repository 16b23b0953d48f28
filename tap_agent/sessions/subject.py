"""What `apply` is told to apply: a proxy, the best one of a run, uniform bits, or the bits in an allocation file."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tap_agent.runs.folder import RunFolder
from tap_agent.sessions.allocation import (
    LEAST,
    MOST,
    AllocatedNetwork,
    AllocationFile,
    AllocationMistake,
    listed,
    read_allocation,
)
from tap_agent.settings.model import Settings
from tap_agent.settings.read import Given
from tap_eval import device
from tap_eval.allocation.budget import most_uniform
from tap_eval.allocation.choices import uniform
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BitsMistake, BudgetMistake, ProxyMistake
from tap_eval.proxies.published import NAMES, published
from tap_eval.quantization.quantizer import Allocation

KINDS = (
    f"a proxy's .py file, a published proxy ({', '.join(NAMES)}), a run's folder, an allocation file (a run's "
    "best.json) or uniform:BITS"
)


@dataclass(frozen=True)
class ProxySubject:
    """A proxy, where it came from, and the settings of its run if they are known."""

    origin: str
    thought: str
    code: str
    given: Given | None


@dataclass(frozen=True)
class UniformSubject:
    """The same bits everywhere, or with None the most that a budget allows."""

    bits: int | None
    given: None = None

    @property
    def origin(self) -> str:
        """As it was written."""
        return f"uniform:{self.bits}" if self.bits else "uniform"

    def allocation(self, bench: Bench) -> Allocation:
        """For the network of `bench`, inputs at the most bits that fit; raises `BudgetMistake` where none are."""
        task = bench.task
        if self.bits:
            return uniform(bench.layers, self.bits, max(task.choices.activations))
        if found := most_uniform(bench.layers, task.choices.activations, task.budget):
            return found
        least = "all bits of which every layer has a latency" if task.budget.unit == "s" else f"{LEAST} bits"
        raise BudgetMistake(f"{bench.name}: {least} everywhere are above {task.budget.text}: raise the budget.")


@dataclass(frozen=True)
class FileSubject:
    """The bits that an allocation file gives to one or several networks."""

    path: Path
    file: AllocationFile
    given: Given | None
    """the settings with which its figures were measured, its own or those of the run that it lies in"""

    @property
    def origin(self) -> str:
        """The file's path."""
        return str(self.path)

    def allocation(self, bench: Bench) -> Allocation:
        """For the network of `bench`, layers matched by name; raises `AllocationMistake` at the first that differs."""
        found = self.network(bench)
        layers = {layer.name: layer for layer in found.layers}
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
                    f"{self.path} is not for {bench.name} but for {found.network}: it {problem}; {_NEXT}."
                )
        if further := layers.keys() - {layer.name for layer in bench.layers}:
            first = next(name for name in layers if name in further)
            raise AllocationMistake(
                f"{self.path} is not for {bench.name} but for {found.network}: it has a layer {first}; {_NEXT}."
            )
        own = [layers[layer.name] for layer in bench.layers]
        return Allocation(tuple(each.weight_bits for each in own), tuple(each.activation_bits for each in own))

    def network(self, bench: Bench) -> AllocatedNetwork:
        """The one in the file that `bench` is; raises `AllocationMistake` where there is none."""
        networks = self.file.networks
        named = [each for each in networks if each.network == bench.name]
        found = named or (networks if len(networks) == 1 else ())
        if len(found) != 1:
            names = ", ".join(each.network for each in networks)
            raise AllocationMistake(f"{self.path} has bits for {names}, and not for one {bench.name}: {_NEXT}.")
        return found[0]

    def differences(self, benches: Sequence[Bench]) -> list[str]:
        """What is not as it was when the figures of the file were measured, a sentence each."""
        told = [*self.file.aged(self.origin)]
        for bench in benches:
            told += self.network(bench).differences(self.origin, bench, self.allocation(bench))
        return told

    def confirmed(self, bench: Bench, correct: int, count: int) -> str:
        """Whether so many test images of `count` are right as the file says, in a sentence; "" where it does not."""
        return self.network(bench).confirmed(self.origin, correct, count)

    def fitted(self, settings: Settings, asked: Collection[str], given: Given | None) -> Settings:
        """The settings with which to measure the file, of which some were `asked` for, and the others `given` by it.

        Its own stay as they are, since the last digit of a scale hangs on the bits that are rounded together; only a
        device that is not there gives way. Of others the bits of the file are among those that the baselines may
        take: weights may have those of the settings and of the file, activations those of the file. Raises
        `BitsMistake` at the first layer whose bits are not among those that were asked for.
        """
        layers = [layer for network in self.file.networks for layer in network.layers]
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
                        f"{self.path} gives layer {layer.name} {listed(beside)} bits, which are not among {flag} "
                        f"{','.join(map(str, offered))}: offer them too, or leave out {flag}."
                    )
        if given is not None and given.path == self.path:
            return settings if "device" in asked else _at_hand(settings)
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
    if what in NAMES:
        proxy = published(what)
        return ProxySubject(what, proxy.thought, proxy.code, None)
    path = Path(what)
    if path.is_dir():
        folder = RunFolder(path)
        result = folder.finished()
        best = result.candidate(result.best)
        return ProxySubject(f"{folder.name}/{best.name}", best.thought, best.code, _beside(path))
    try:
        text = path.read_text()
    except PermissionError:  # which is told as what it is
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ProxyMistake(f"{path} is no proxy and no run: give {KINDS}.") from error
    if path.suffix == ".json" or text.lstrip().startswith("{"):
        file = read_allocation(path, text)
        own = None if file.settings is None else Given(path, file.settings)
        return FileSubject(path, file, own or _beside(path.parent if path.name == "best.json" else None))
    return ProxySubject(str(path), "", text, _beside(path.parent.parent if path.parent.name == "proxies" else None))


def _at_hand(settings: Settings) -> Settings:
    """On any device of this machine, where the one of the settings is not there."""
    try:
        device.chosen(settings.device, device.found())
    except device.DeviceMistake:
        return settings.model_copy(update={"device": "auto"})
    return settings


def _bits(what: str, text: str) -> int:
    if not re.fullmatch("[0-9]", text) or not LEAST <= int(text) <= MOST:
        raise BitsMistake(
            f"'{what}' gives no bits that weights may have: write one whole number from {LEAST} to {MOST}, as in "
            "uniform:3, or uniform alone for the most that --budget allows."
        )
    return int(text)


def _beside(folder: Path | None) -> Given | None:
    """The settings of the run in `folder`, if it is one."""
    config = folder and folder / "config.yaml"
    return RunFolder(config.parent).given if config and config.is_file() else None
