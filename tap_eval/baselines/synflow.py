"""bit-Synflow: bits by the flow through the weights of a layer, all made positive, from an image of ones.

Batch normalization is folded into weights, of which the absolute values are then taken, and biases are left out.
Everything else of the network is as it is. Computed in float64: nothing keeps the flow from growing with depth.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from tap_eval.baselines.gradients import Network, saliency
from tap_eval.baselines.rule import Cost, Effort, Found, Rule, by_gains, finite, minimizing
from tap_eval.device import widest
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import NetworkMistake
from tap_eval.preparing.copying import copy_of
from tap_eval.preparing.prepared import Prepared, Room
from tap_eval.preparing.products import Quantizable

_VERSION = 1


def positive(prepared: Prepared, kind: torch.dtype) -> Prepared:
    """With the absolute values of the layers' weights and without their biases, in floats of `kind`."""
    modules = tuple(_positive(module, kind) for module in prepared.modules)
    return replace(prepared, network=copy_of(prepared.network).to(kind), modules=modules, room=Room())


def _positive(module: Quantizable, kind: torch.dtype) -> Quantizable:
    made = copy.copy(module)
    weight = module.weight.detach().abs().to(kind)
    made._parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
    return made


def scores(bench: Bench) -> list[float]:
    """Of each layer; raises `NetworkMistake` where they are beyond the range of floats, or nothing flows."""
    network = Network(bench, positive(bench.prepared, widest(bench.device)))
    found = network.scores(network.sum_of_logits, saliency)
    finite(bench, found)
    plain = Network(bench)
    still = [layer for layer, each in zip(bench.layers, found, strict=True) if each == 0]
    if stopped := [layer.name for layer in still if plain.matters(layer.index)]:
        raise NetworkMistake(
            f"nothing flows through {stopped[0]} of {bench.name} once weights are positive, as where activations have "
            "a highest value: leave synflow out of --baselines."
        )
    return found


def _find(bench: Bench, _: Effort) -> Found:
    found, seconds = bench.once(["synflow", _VERSION], lambda: scores(bench))
    gains = [each / max(found) for each in found]
    return minimizing(bench, by_gains(gains), Cost(0, 1, seconds), "an image of ones")


RULE = Rule(
    "bit-Synflow", "max sum_i b_i sum|W_i dR/dW_i|, R the sum of logits",
    "Tanaka et al. 2020, arXiv:2006.05467, with bits as in arXiv:2307.10554", ("weights", "gradients"), _find,
)  # fmt: skip
