"""Networks by name: the digits CNN, CIFAR ResNets, torchvision's classifiers, and any factory."""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from tap_eval.mistake import NetworkMistake, WeightsMistake
from tap_eval.networks.digits import load_digits_cnn
from tap_eval.networks.resnet import DEPTHS, CifarResNet

NETWORKS = "digits, cifar_resnet20/32/44/56, a torchvision classifier, or package.module:factory"


def load_network(name: str, weights: Path | None, cache: Path) -> nn.Module:
    """The trained network called `name`, in eval mode on the CPU.

    `weights` is a state dict on disk; torchvision's networks download their published weights
    without it. Raises `NetworkMistake` or `WeightsMistake`.
    """
    if name == "digits":
        if weights is not None:
            raise WeightsMistake(f"digits is trained here and takes no {weights}: give the --network of these weights.")
        return load_digits_cnn(cache)
    network = _build(name, pretrained=weights is None)
    if weights is not None:
        _load_weights(network, name, weights)
    return network.eval()


def _build(name: str, pretrained: bool) -> nn.Module:
    if match := re.fullmatch(r"cifar_resnet(\d+)", name):
        depth = int(match[1])
        if depth not in DEPTHS:
            raise NetworkMistake(f"'{name}' is unknown: CIFAR ResNets have {', '.join(map(str, DEPTHS))} layers.")
        if pretrained:
            raise WeightsMistake(f"{name} has no weights of its own: give a state dict with --weights FILE.")
        return CifarResNet(depth)
    if ":" in name:
        return _from_factory(name)
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "digits", *(f"cifar_resnet{d}" for d in DEPTHS)], 1)
        hint = f", perhaps {near[0]}" if near else ""
        raise NetworkMistake(f"'{name}' is an unknown network: give {NETWORKS}{hint}.")
    if not pretrained:
        return models.get_model(name, weights=None)
    try:
        return models.get_model(name, weights="DEFAULT")
    except OSError as error:
        raise WeightsMistake(
            f"the published weights of {name} cannot be downloaded ({error}): give a state dict with --weights FILE."
        ) from error


def _from_factory(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    try:
        factory: Any = getattr(importlib.import_module(module), attribute)
        network = factory()
    except Exception as error:  # the factory is the user's code: whatever it raises is the user's to see
        raise NetworkMistake(
            f"'{name}' cannot be built ({type(error).__name__}: {error}): name a function without arguments as "
            "package.module:function, of a package that is installed or in a folder that PYTHONPATH names."
        ) from error
    if not isinstance(network, nn.Module):
        raise NetworkMistake(f"'{name}' returned a {type(network).__name__}: a torch.nn.Module is needed.")
    return network


def _load_weights(network: nn.Module, name: str, path: Path) -> None:
    if path.exists() and not path.is_file():
        raise WeightsMistake(f"{path} is no file: give that of a state dict.")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsMistake(f"{path} does not exist: give the file of a state dict with --weights.") from error
    except Exception as error:  # what a file of another kind makes of the unpickler is anybody's guess
        reason = str(error).split("\n")[0].split(". ")[0]
        raise WeightsMistake(
            f"{path} cannot be read as a state dict ({type(error).__name__}: {reason}): save "
            "network.state_dict(), not the network."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsMistake(f"{path} holds a {type(loaded).__name__}, no state dict: save network.state_dict().")
    state = {key.removeprefix("module."): value for key, value in loaded.items()}
    expected = network.state_dict()
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is not of this network" for key in state if key not in expected]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise WeightsMistake(f"{path} does not fit {name}: {problems[0]}{more}; give weights of {name}.")
    network.load_state_dict(state)
