"""Settings from a YAML config and from flags, and back to YAML; what is wrong with them in a sentence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from agents.models import elsewhere
from tap_agent.settings.model import HIDDEN, NetworkSettings, Settings
from tap_eval.images.images import Transform
from tap_eval.mistake import Mistake

for model in (NetworkSettings, Settings):
    model.model_rebuild()  # which is put off until torch is imported, and is not for several threads to do at once


class ConfigMistake(Mistake):
    """A config or a flag that cannot be read, or that holds an unknown field."""

    kind = "config"


class Given(NamedTuple):
    """Settings, and the file that they are from."""

    path: Path
    values: dict[str, Any]


def read_settings(config: Path | Given | None, flags: Mapping[str, Any]) -> Settings:
    """The settings of `config` with `flags` over them, where those are not None; raises `ConfigMistake`.

    Flags have the names of their settings. Those of a network speak of the one network of the
    config; a `budget` speaks of the run. A model that says itself where it is served does not have
    the config's address: keys go to their own servers.
    """
    path, values = config if isinstance(config, Given) else (config, read_yaml(config) if config else {})
    values = dict(values)
    given = {name: value for name, value in flags.items() if value is not None}
    if "llm" in given and values.get("base_url") and elsewhere(given["llm"], str(values.get("llm", ""))):
        del values["base_url"]
    of_network = {
        name: given.pop(name)
        for name in NetworkSettings.model_fields
        if name in given and name not in Settings.model_fields
    }
    if of_network:
        networks = values.get("networks") or [{}]
        if not isinstance(networks, list) or len(networks) != 1 or not isinstance(networks[0], dict):
            raise ConfigMistake(
                f"--{next(iter(of_network))} does not say which network of {path} it means: edit the config instead."
            )
        values["networks"] = [networks[0] | of_network]
    try:
        return Settings.model_validate(values | given)
    except ValidationError as error:
        by_flag = {*given, *of_network} & {str(part) for part in error.errors()[0]["loc"]}
        raise ConfigMistake(_sentence(error, None if by_flag else path)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `ConfigMistake`."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigMistake(f"the config {path} cannot be read ({error}): give an existing YAML file.") from error
    return mapping(text, path)


def mapping(text: str, path: Path) -> dict[str, Any]:
    """The mapping in the text of a YAML file; raises `ConfigMistake`."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        twice = _twice(node, set())
        values = loader.construct_document(node) if node and not twice else None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # of its constructors
        raise ConfigMistake(f"the config {path} is not YAML ({' '.join(str(error).split())}).") from error
    if twice:
        raise ConfigMistake(f"the config {path} has {twice}: give each setting once.")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigMistake(f"the config {path} holds a {type(values).__name__}: give a mapping of settings.")
    return values


def _twice(node: Any, seen: set[int]) -> str | None:
    """The first key that stands twice in one mapping of a document, of which the last would win."""
    if node is None or id(node) in seen or isinstance(node, yaml.ScalarNode):
        return None
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return next(filter(None, (_twice(each, seen) for each in node.value)), None)
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in lines:
                return f"{key.value} in line {lines[key.tag, key.value]} and in line {line}"
            lines[key.tag, key.value] = line
        if found := _twice(value, seen):
            return found
    return None


def dump(settings: Settings) -> str:
    """As YAML, every setting with its value."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _sentence(error: ValidationError, config: Path | None) -> str:
    """The first problem, and for an unknown field the nearest that exists."""
    problem = error.errors()[0]
    place, last = [str(part) for part in problem["loc"]], str(problem["loc"][-1])
    where = f" in {config}" if config else ""
    if problem["type"] == "extra_forbidden":
        model: type[BaseModel] = Settings
        if place[0] == "networks":
            model = Transform if "transform" in place else NetworkSettings
        known = [*model.model_fields]
        near = difflib.get_close_matches(last, known, 1, cutoff=0.0)
        return f"'{last}'{where} is an unknown setting: perhaps {near[0]}; known are {', '.join(known)}."
    value = "" if problem["type"] == HIDDEN else f" = {problem['input']!r}"
    return f"{'.'.join(place)}{value}{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}."
