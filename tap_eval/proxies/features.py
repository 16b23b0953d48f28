"""What a proxy may see of a layer: scalars from its architecture, and from weights and activations.

`METADATA` and `STATISTICS` name every feature and say what it is; the prompts publish these
lists, and `describe` returns exactly them. Statistics of activations come from the
calibration images. No tensor, gradient, label, layer error or accuracy is among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import torch
from torch import Tensor, nn

from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.images.images import Images
from tap_eval.networks.layers import Layer, Prepared

Inputs = Literal["metadata", "statistics"]
Value = float | int | bool | str | list[int] | dict[str, list[float]]
Features = dict[str, Value]

METADATA = {
    "name": "its name in the network",
    "kind": "'conv', 'depthwise', 'linear' or 'attention'",
    "block": "name of the module that holds it",
    "index": "position, from 0",
    "depth": "position in (0, 1], the last layer has 1",
    "in_channels": "input channels or features",
    "out_channels": "output channels or features",
    "kernel": "kernel size, 1 for linear layers",
    "stride": "stride",
    "groups": "groups of the convolution",
    "input_size": "input height in pixels, 1 for linear layers",
    "output_size": "output height in pixels, 1 for linear layers",
    "tokens": "length of the sequence, 1 outside transformers",
    "params": "weight elements",
    "macs": "multiply-accumulates an image",
    "first": "True for the first layer",
    "last": "True for the last layer",
}
_OF_VALUES = {
    "mean": "mean",
    "std": "standard deviation",
    "absmax": "greatest absolute value",
    "kurtosis": "fourth standardized moment, 3 for a normal distribution",
    "entropy": "entropy in nats over 256 bins",
}
_OF_WEIGHTS = {
    "l1": "sum of absolute values",
    "l2": "root of the sum of squares",
    **{name: _OF_VALUES[name] for name in ("std", "absmax", "kurtosis", "entropy")},
}
_OF_ACTIVATIONS = {**_OF_VALUES, "sparsity": "share of exact zeros"}
STATISTICS = {
    **{f"weight_{name}": f"weights: {text}" for name, text in _OF_WEIGHTS.items()},
    **{f"input_{name}": f"the layer's input: {text}" for name, text in _OF_ACTIVATIONS.items()},
    **{f"activation_{name}": f"the layer's output: {text}" for name, text in _OF_ACTIVATIONS.items()},
    "channels": "dict from a weight_ or activation_ name to a list, one value an output channel",
}
TASK = {
    "dataset": "name of the image source",
    "classes": "number of classes",
    "image_size": "height of an image in pixels",
    "layers": "number of layers",
    "params": "weight elements of all layers",
    "macs": "multiply-accumulates an image of all layers",
    "budget": "the budget as the user wrote it",
    "bits": "list of the weight bits that a layer may take",
}


def visible(inputs: Inputs) -> dict[str, str]:
    """The features of a layer under the contract `inputs`, each with its meaning."""
    return METADATA | (STATISTICS if inputs == "statistics" else {})


def describe_task(
    layers: Sequence[Layer], images: Images, source: str, classes: int, choices: Choices, budget: Budget
) -> Features:
    """The `task` that a proxy gets: exactly the names of `TASK`."""
    task: Features = {
        "dataset": source.split(":")[0],
        "classes": classes,
        "image_size": images.size,
        "layers": len(layers),
        "params": sum(layer.params for layer in layers),
        "macs": sum(layer.macs for layer in layers),
        "budget": budget.text,
    }
    return task | {"bits": list(choices.weights)}


@torch.no_grad()
def describe(prepared: Prepared, calibration: Images, inputs: Inputs) -> list[Features]:
    """One dict a layer, with exactly the names of `visible(inputs)`."""
    described: list[Features] = [asdict(layer) for layer in prepared.layers]
    if inputs == "metadata":
        return described
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in prepared.layers}
    handles = [
        prepared.module(layer).register_forward_hook(
            lambda module, args, output, name=layer.name: seen[name].append((args[0], output))
        )
        for layer in prepared.layers
    ]
    prepared.network(calibration.pixels)
    for handle in handles:
        handle.remove()
    for layer, features in zip(prepared.layers, described, strict=True):
        module = prepared.module(layer)
        axis = 1 if isinstance(module, nn.Conv2d) else -1
        weight = module.weight.flatten(1)
        x = torch.cat([x.flatten() for x, _ in seen[layer.name]])
        output = torch.cat([y.movedim(axis, 0).flatten(1) for _, y in seen[layer.name]], dim=1)
        channels = _prefixed("weight", _statistics(weight), _OF_WEIGHTS) | _prefixed(
            "activation", _statistics(output), _OF_ACTIVATIONS
        )
        whole = (
            _prefixed("weight", _statistics(weight.reshape(1, -1)), _OF_WEIGHTS)
            | _prefixed("input", _statistics(x[None]), _OF_ACTIVATIONS)
            | _prefixed("activation", _statistics(output.reshape(1, -1)), _OF_ACTIVATIONS)
        )
        features.update({name: values[0] for name, values in whole.items()})
        features["channels"] = channels
    return described


def _prefixed(prefix: str, values: dict[str, Tensor], names: dict[str, str]) -> dict[str, list[float]]:
    return {f"{prefix}_{name}": values[name].tolist() for name in names}


def _statistics(rows: Tensor) -> dict[str, Tensor]:
    """Each statistic of each row of (R, N), as (R,) float64."""
    rows = rows.double()
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    variance = centred.square().mean(1)
    return {
        "l1": rows.abs().sum(1),
        "l2": rows.square().sum(1).sqrt(),
        "mean": mean,
        "std": variance.sqrt(),
        "absmax": rows.abs().amax(1),
        "kurtosis": centred.pow(4).mean(1) / variance.square().clamp_min(1e-24),
        "entropy": _entropy(rows),
        "sparsity": (rows == 0).double().mean(1),
    }


def _entropy(rows: Tensor, bins: int = 256) -> Tensor:
    """Entropy in nats of each row's histogram over `bins` equal bins between its least and greatest value."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    place = ((rows - low) / (high - low).clamp_min(1e-30) * bins).long().clamp_(0, bins - 1)
    place += torch.arange(len(rows), device=rows.device)[:, None] * bins
    share = torch.bincount(place.flatten(), minlength=len(rows) * bins).view(len(rows), bins) / rows.shape[1]
    return -torch.special.xlogy(share, share).sum(1).double()
