"""Networks by name: the digits CNN, CIFAR ResNets, those of torchvision and other collections, and any factory."""

from __future__ import annotations

import difflib
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torchvision import models

from tap_eval.images.images import Transform
from tap_eval.mistake import NetworkMistake, WeightsMistake
from tap_eval.networks import published
from tap_eval.networks.checkpoint import read
from tap_eval.networks.collections import LITE, Built, collected
from tap_eval.networks.digits import load_digits_cnn
from tap_eval.networks.resnet import DEPTHS, CifarResNet
from tap_eval.networks.weights import load_weights

NETWORKS = (
    "digits, cifar_resnet20/32/44/56, efficientnet_lite0/1/2, a torchvision classifier, timm:NAME, hf:NAME, or "
    "package.module:factory"
)


@dataclass(frozen=True)
class Loaded:
    """A trained network, in eval mode on the CPU."""

    network: nn.Module
    transform: Transform | None = None
    """what its weights want of images, where that is known"""
    notes: tuple[str, ...] = ()
    """what a user should know of how it came about"""


def load_network(name: str, weights: Path | None, cache: Path, weights_entry: str | None = None) -> Loaded:
    """The network called `name` with the weights in a file, or with its own where it has some.

    `weights` is a state dict on disk; torchvision's networks download their published weights
    without it. `weights_entry` names those of torchvision's that are meant, or from which those
    in the file come. Raises `NetworkMistake` or `WeightsMistake`.
    """
    if name in models.list_models(module=models):
        loaded = _of_torchvision(name, weights, weights_entry)
    elif weights_entry is not None:
        raise WeightsMistake(f"'{weights_entry}' names weights of torchvision's, {name} is none of its networks.")
    elif name == "digits":
        if weights is not None:
            raise WeightsMistake(f"digits is trained here and takes no {weights}: give the --network of these weights.")
        loaded = Loaded(load_digits_cnn(cache))
    else:
        built = collected(name, weights is None) or Built(_build(name, weights is None), None)
        notes = load_weights(built.network, name, read(weights)) if weights else ()
        loaded = Loaded(built.network, built.transform, (*built.notes, *notes))
    loaded.network.eval()
    return loaded


def _of_torchvision(name: str, weights: Path | None, asked: str | None) -> Loaded:
    """Built as torchvision builds it for the weights that are meant."""
    entry = published.named(name, asked) if asked else None
    if weights is None:  # read as any file is: torchvision would run what its pickle says
        entry = entry or published.named(name, "DEFAULT")
        try:
            weights = published.fetched(entry)
        except (OSError, RuntimeError) as error:
            raise WeightsMistake(
                f"the published weights of {name} cannot be downloaded ({error}): put {entry.url} at "
                f"{published.place(entry)}, or give a state dict with --weights FILE."
            ) from error
    checkpoint = read(weights)
    found = published.recognised(weights, published.entries(name))
    if entry and found and entry is not found:
        raise WeightsMistake(
            f"{weights} is torchvision's {found.name}, not {asked}: give --weights-entry {found.name}."
        )
    entry = entry or found
    auxiliary = any("aux" in key.lower() for table in checkpoint.tables for key in table.tensors)
    network = models.get_model(name, weights=None, **published.arguments(name, entry, auxiliary))
    notes = load_weights(network, name, checkpoint)
    if entry:
        notes += (f"{name} is built as torchvision does for its weights {entry.name}",)
        return Loaded(network, published.transform(entry), notes)
    if published.is_silent_on_input(name):
        notes += (
            f"{weights.name} does not tell whether {name} normalizes its input anew, as with torchvision's published "
            "weights: it does not here, and would with --weights-entry IMAGENET1K_V1",
        )
    return Loaded(network, notes=notes)


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
    known = [*models.list_models(module=models), "digits", *LITE, *(f"cifar_resnet{depth}" for depth in DEPTHS)]
    near = difflib.get_close_matches(name, known, 1)
    hint = f", perhaps {near[0]}" if near else ""
    raise NetworkMistake(f"'{name}' is an unknown network: give {NETWORKS}{hint}.")


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
