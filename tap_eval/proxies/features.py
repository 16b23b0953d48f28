"""What a proxy may see of a layer: scalars from its architecture, and from weights and activations.

`METADATA` and `STATISTICS` name every feature and say what it is; the prompts publish these
lists, and `describe` returns exactly them. Statistics of activations come from the
calibration images, and what rounding costs from weights and the second moments of inputs. No
tensor, gradient, label, layer error or accuracy is among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.images.images import Images
from tap_eval.preparing.layers import Layer
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.proxies.consumers import OPERATIONS, consumers, weight_on
from tap_eval.proxies.spectrum import spectra
from tap_eval.proxies.statistics import Spread, Statistics, statistics

VERSION = 5
"""Part of the key of kept features: raise it when a change here changes them."""
_BYTES = 40
"""for each value of a layer's input and output: itself, and what is computed of it"""
Inputs = Literal["metadata", "statistics"]
Value = float | int | bool | str | list[int] | list[str] | dict[str, list[float]]
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
    "input_size": "input width in pixels, 1 for linear layers",
    "output_size": "output width in pixels, 1 for linear layers",
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
_OF_INPUTS = {**_OF_VALUES, "sparsity": "share of exact zeros"}
_OF_OUTPUTS = {**_OF_INPUTS, "power": "mean of the squares"}
_OF_MOMENTS = {
    "input_trace": "trace of H, the second moment about zero of what an output channel's weights are multiplied with",
    "input_rank": "effective rank of H, its squared trace over the sum of its squared entries",
}
STATISTICS = {
    **{f"weight_{name}": f"weights: {text}" for name, text in _OF_WEIGHTS.items()},
    **{f"input_{name}": f"the layer's input: {text}" for name, text in _OF_INPUTS.items()},
    **_OF_MOMENTS,
    **{f"activation_{name}": f"the layer's output: {text}" for name, text in _OF_OUTPUTS.items()},
    "channels": "dict from a weight_ or activation_ name, or consumer_weight, to a list, one value an output channel; "
    "consumer_weight is the norm of the weights of consumers that meet the channel, 0 where that is not known",
    "input_channels": "dict from mean and variance to a list, one value an input channel",
    "rounding_error": "dict from bits, as text, to a list, one value an output channel: the mean squared error of its "
    "output if its weights were rounded to the nearest level of so many bits, the shift of its mean left out",
    "consumers": "list of the indices of the layers that read the output, as far as the next addition but one",
    "operations": f"list of what the output goes through on its way to them, of {', '.join(OPERATIONS)}",
}
TASK = {
    "dataset": "what the data is called, or 'images' where it does not say",
    "classes": "number of classes",
    "image_size": "width of an image in pixels",
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
    layers: Sequence[Layer], image_size: int, data: str, classes: int, choices: Choices, budget: Budget
) -> Features:
    """The `task` that a proxy gets: exactly the names of `TASK`."""
    task: Features = {
        "dataset": data,
        "classes": classes,
        "image_size": image_size,
        "layers": len(layers),
        "params": sum(layer.params for layer in layers),
        "macs": sum(layer.macs for layer in layers),
        "budget": budget.text,
    }
    return task | {"bits": list(choices.weights)}


@dataclass(frozen=True)
class _Seen:
    """Statistics of a layer's input, of its output, of its output by channel, and of its input by channel."""

    input: Statistics
    output: Statistics
    channels: Statistics
    inputs: Spread


@torch.no_grad()
def describe(
    prepared: Prepared,
    calibration: Images | Tensor,
    inputs: Inputs,
    memory: int = 2**29,
    bits: Sequence[int] = Choices().weights,
) -> list[Features]:
    """One dict a layer, with exactly the names of `visible(inputs)`; `bits` are those that weights may take.

    The calibration images go through the network in parts, twice for the statistics and at least
    once for the second moments, so that about `memory` bytes are in use. A layer that none of them reaches is described
    by the images on which it was found.
    """
    described: list[Features] = [asdict(layer) for layer in prepared.layers]
    if inputs == "metadata":
        return described
    seen = [
        _Seen(Statistics(1), Statistics(1), Statistics(layer.out_channels), Spread(layer.in_channels))
        for layer in prepared.layers
    ]
    at_once = _images_at_once(prepared, memory)
    for images, size in prepared.reaching(calibration, at_once):
        missing = [not each.output.count for each in seen]
        for second in (False, True) if any(missing) else ():
            layers = [
                partial(_see, each, module, second) if absent else module
                for each, module, absent in zip(seen, prepared.modules, missing, strict=True)
            ]
            for part in images.split(size):
                prepared(part, layers)
    prepared.check_reached({index for index, each in enumerate(seen) if each.output.count})
    moments = spectra(prepared, calibration, at_once, memory, bits)
    read = consumers(prepared, next(iter(calibration.split(1))))
    for module, found, spectrum, of_output, features in zip(
        prepared.modules, seen, moments, read, described, strict=True
    ):
        weight = module.weight.flatten(1)
        channels = {
            **_prefixed("weight", statistics(weight), _OF_WEIGHTS),
            **_prefixed("activation", found.channels.values(), _OF_OUTPUTS),
            "consumer_weight": _rounded(weight_on(module, [prepared.modules[index] for index in of_output.layers])),
        }
        whole = (
            _prefixed("weight", statistics(weight.reshape(1, -1)), _OF_WEIGHTS)
            | _prefixed("input", found.input.values(), _OF_INPUTS)
            | _prefixed("activation", found.output.values(), _OF_OUTPUTS)
        )
        features.update({name: values[0] for name, values in whole.items()})
        features.update(zip(_OF_MOMENTS, (spectrum.trace, spectrum.rank), strict=True))
        features["channels"] = channels
        features["input_channels"] = {name: _rounded(values) for name, values in found.inputs.values().items()}
        features["rounding_error"] = {str(each): _rounded(errors) for each, errors in spectrum.errors.items()}
        features["consumers"] = list(of_output.layers)
        features["operations"] = list(of_output.operations)
    return described


def _images_at_once(prepared: Prepared, memory: int) -> int:
    """So many that the largest layer's input and output, and what is computed of them, fit."""
    largest = max(
        layer.tokens * (layer.in_channels * layer.input_size**2 + layer.out_channels * layer.output_size**2)
        for layer in prepared.layers
    )
    return max(memory // (_BYTES * largest), 1)


def _see(seen: _Seen, module: Quantizable, second: bool, x: Tensor) -> Tensor:
    """The layer's output, which is taken into its statistics with its input."""
    y: Tensor = module(x)
    axis = 1 if isinstance(module, nn.Conv2d) else -1
    by_channel = y.movedim(axis, 0).flatten(1)
    if not second:
        seen.inputs.take(x.movedim(axis, 0).flatten(1))
    for found, part in (
        (seen.input, x.reshape(1, -1)),
        (seen.output, by_channel.reshape(1, -1)),
        (seen.channels, by_channel),
    ):
        (found.second if second else found.first)(part)
    return y


def _prefixed(prefix: str, values: dict[str, Tensor], names: dict[str, str]) -> dict[str, list[float]]:
    return {f"{prefix}_{name}": values[name].tolist() for name in names}


def _rounded(values: Tensor) -> list[float]:
    """To six digits: long lists go into the sandbox with each proxy."""
    return [float(f"{value:.6g}") for value in values.tolist()]
