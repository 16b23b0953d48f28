"""What a table is made of: a plan names networks, budgets, rows and what varies, as data that anyone can write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tap_agent.settings.model import NetworkSettings, Settings
from tap_agent.settings.read import ConfigMistake, Given, read_settings, read_yaml
from tap_agent.tables.cited import tables
from tap_eval.mistake import ImagesMistake

NAMED = ("ptq", "qat", "vit", "cost")
"""plans that come with the program, by the names that `tap-agent table` takes"""
ABLATIONS = (
    "alpha", "population", "draws", "llm", "executability", "controller", "worth", "rounding",
)  # fmt: skip
"""those of `tap-agent table ablation`"""
ABLATION = "ablation"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Absent(_Model):
    """A row that nobody here can measure."""

    network: str
    row: str
    why: str


class Plan(_Model):
    """A table that is to be measured."""

    title: str
    about: str = ""
    """what a reader has to know beside it"""
    measures: Literal["allocations", "cost", "searches"] = "allocations"
    """the test accuracy of allocations; what finding them costs; or what searches come to"""
    settings: dict[str, Any] = {}
    """as a config has them, networks with images and `budget` included; several budgets have commas between them"""
    vary: tuple[dict[str, Any], ...] = Field(({},), min_length=1)
    """settings in place of those, one variant after the other"""
    against: dict[str, Any] | None = None
    """the variant of searches that the others are compared with"""
    proxies: tuple[str, ...] = ("paper", "channel_noise")
    """as `tap-agent apply` takes them: a run's folder, a proxy's file or a published one; searches have none"""
    seeds: int = Field(5, ge=1)
    """of searches, and of what finding bits costs; allocations have `calibration_draws` of the settings"""
    shows: tuple[str, ...] = ()
    """quantities of `tap_agent.tables.line.COLUMNS` that are shown, without any all; the Parquet file has all"""
    cited: tuple[str, ...] = ()
    """tables of the paper whose figures stand beside"""
    absent: tuple[Absent, ...] = ()

    @field_validator("cited")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in tables()]:
            raise ValueError(f"'{unknown[0]}' is no table that is cited: give some of {', '.join(tables())}")
        return names


@dataclass(frozen=True)
class Variant:
    """Settings with what a plan varies."""

    label: str
    settings: Settings


@dataclass(frozen=True)
class Planned:
    """A plan with the settings that are given beside it."""

    name: str
    plan: Plan
    variants: tuple[Variant, ...]
    given: bool
    """whether its networks and images were named by who asks for it"""

    @property
    def against(self) -> str | None:
        """The label of the variant that others are compared with."""
        return None if self.plan.against is None else _label(self.plan.against)


def planned(
    what: str,
    ablation: str | None,
    config: Path | None,
    flags: Mapping[str, Any],
    proxies: tuple[str, ...] = (),
    seeds: int | None = None,
) -> Planned:
    """The plan that `what` names, or its `ablation`, or a file; with the settings of `config`, and `flags` over all.

    A flag of what the plan varies takes the place of its variants. Raises `ConfigMistake`.
    """
    path, name = _path(what, ablation)
    plan = _read(path)
    if proxies and plan.measures == "searches":
        raise ConfigMistake(f"{name} searches proxies of its own: leave --proxy out.")
    if seeds and plan.measures == "allocations":
        raise ConfigMistake(f"{name} has draws of calibration images in place of seeds: give --draws {seeds}.")
    changed = {"proxies": proxies} if proxies else {}
    plan = plan.model_copy(update=changed | ({"seeds": seeds} if seeds else {}))
    values = plan.settings | (read_yaml(config) if config else {})
    given = {each: value for each, value in flags.items() if value is not None}
    own = {each: given.pop(each) for each in NetworkSettings.model_fields if each in given and each != "budget"}
    values["networks"] = _networks(values.get("networks") or [{}], own, config or path, "budget" in given)
    varied = {each for variant in plan.vary for each in variant}
    if narrowed := {each: given.pop(each) for each in sorted(varied & given.keys())}:
        plan = plan.model_copy(update={"vary": (narrowed,)})
    source = config or path
    variants = [
        Variant(_label(changes), read_settings(Given(source, values | changes), given)) for changes in plan.vary
    ]
    return Planned(name, plan, tuple(variants), bool(own) or config is not None or not _comes(what))


def _comes(what: str) -> bool:
    """Whether a plan of that name comes with the program."""
    return what in (*NAMED, ABLATION)


def _path(what: str, ablation: str | None) -> tuple[Path, str]:
    """The file of a plan, and what its table is called."""
    plans = Path(str(files(__package__) / "plans"))
    if what == ABLATION:
        return plans / ABLATION / f"{ablation}.yaml", f"{ABLATION}-{ablation}"
    if what in NAMED:
        return plans / f"{what}.yaml", what
    if Path(what).suffix not in (".yaml", ".yml"):
        raise ConfigMistake(
            f"'{what}' is no table: give {', '.join(NAMED)}, {ABLATION}, or a plan of your own as FILE.yaml."
        )
    return Path(what), Path(what).stem


def _read(path: Path) -> Plan:
    try:
        return Plan.model_validate(read_yaml(path))
    except ValidationError as error:
        problem = error.errors()[0]
        known = f"; known are {', '.join(Plan.model_fields)}" if problem["type"] == "extra_forbidden" else ""
        where = ".".join(map(str, problem["loc"]))
        why = problem["msg"].removeprefix("Value error, ")
        raise ConfigMistake(f"the plan {path}: {where}: {why}{known}.") from error


def _networks(networks: Any, own: Mapping[str, Any], path: Path, budget: bool) -> Any:
    """Those of a plan with flags over them; a network that it does not have takes the place of several.

    They lose budgets of their own where `budget` says that one is given for all.
    """
    if not isinstance(networks, list) or not all(isinstance(each, dict) for each in networks):
        return networks  # which settings refuse
    if budget:
        networks = [{key: value for key, value in each.items() if key != "budget"} for each in networks]
    name = own.get("network")
    if name is not None and len(networks) > 1:
        networks = [each for each in networks if each.get("network") == name] or [{}]
    if "weights" in own and len(networks) > 1:
        names = ", ".join(str(each.get("network", "digits")) for each in networks)
        raise ConfigMistake(f"--weights does not say which of {names} of {path} it means: give --network too.")
    found = [{**each, **own} for each in networks]
    for each in found:
        if name not in (None, "digits") and "images" not in own and each.get("images", "digits") == "digits":
            raise ImagesMistake(f"{name} needs images: give --images, as parquet:FILE or imagefolder:DIR.")
    return found


def _label(changes: Mapping[str, Any]) -> str:
    """As `alpha 0.1`; of several, with commas between."""
    words = {name: yaml.safe_dump(value, default_flow_style=True).splitlines()[0] for name, value in changes.items()}
    return ", ".join(f"{name} {value}" for name, value in words.items())
