"""The layer-error table in one sweep: what quantizing one layer alone does to the network's output.

All variants of a network that differ in one layer agree up to that layer, so each is run from
there on, out of the full-precision pass: about half the work of running each from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tap_eval.images.images import Images
from tap_eval.measuring.accuracy import mean_kl
from tap_eval.preparing.program import Program, bind
from tap_eval.quantization.quantizer import QuantizedNetwork

_IMAGES, _IMAGES_LARGE, _LARGE = 512, 32, 64


def enough(images: Images) -> int:
    """How many of `images` rank layers: 512, or 32 of more than 64 pixels.

    On EfficientNet-Lite0 (weights to the nearest 2 bits) the errors on 16, 32 and 64 images have rank correlations of
    0.95, 0.97 and 0.98 with those on 48 others.
    """
    return min(_IMAGES if images.size <= _LARGE else _IMAGES_LARGE, len(images))


@torch.inference_mode()
def layer_errors(
    network: QuantizedNetwork,
    program: Program,
    pixels: Tensor | Images,
    bits: Sequence[int],
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> list[list[float]]:
    """Mean KL divergence (nats) of the output, one row a layer, one number for each of `bits`, on `pixels` (N, ...).

    Everything but the one layer's weights is in full precision. `advance` is told how many layers are done, each once a
    batch, of how many.
    """
    network.choose(None)
    bound = bind(program, network.layers)
    expected: list[Tensor] = []
    found: list[list[list[Tensor]]] = [[[] for _ in bits] for _ in network.layers]
    done, of = 0, -(-len(pixels) // program.batch) * len(found)
    for part in pixels.split(program.batch):
        known = program.begin(program.padded(part))
        for place, step in enumerate(bound.steps):
            if step.layer is not None and len(found[step.layer][0]) == len(expected):  # its first call
                for column, choice in enumerate(bits):
                    network.layers[step.layer].choose(choice, None)
                    found[step.layer][column].append(bound.run(dict(known), place)[: len(part)])
                network.layers[step.layer].choose(None, None)
                done += 1
                advance(done, of)
            step.run(known)
        expected.append(known[bound.logits][: len(part)])
    advance(of, of)
    reference = torch.cat(expected)
    return [[mean_kl(reference, torch.cat(parts)) if parts else 0.0 for parts in row] for row in found]


def layer_errors_one_by_one(
    network: QuantizedNetwork,
    pixels: Tensor | Images,
    batch: int,
    bits: Sequence[int],
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> list[list[float]]:
    """The same, each variant run from the start: for networks of which there is no program."""
    network.choose(None)
    reference = network.logits(pixels, batch)
    errors: list[list[float]] = []
    for layer in network.layers:
        row = []
        for choice in bits:
            layer.choose(choice, None)
            row.append(mean_kl(reference, network.logits(pixels, batch)))
        layer.choose(None, None)
        errors.append(row)
        advance(len(errors), len(network.layers))
    return errors
