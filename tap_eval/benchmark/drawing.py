"""Allocations drawn at random, as many of every size."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tap_eval.allocation.choices import Choices
from tap_eval.allocation.size import weight_size
from tap_eval.mistake import BenchmarkMistake
from tap_eval.preparing.layers import Layer
from tap_eval.quantization.quantizer import Allocation

_TRIES = 1000
"""at an allocation that is none of those before"""


def drawn(
    layers: Sequence[Layer], choices: Choices, edges: Sequence[float], count: int, seed: int
) -> list[list[Allocation]]:
    """In each stratum, which is between two of the `edges`, average bits a weight, as many that differ: `count` in all.

    Every layer is given one of its choices at random; then random layers are moved to the next choice up or down until
    the size is in the stratum. Layers are whole, activations have the most bits. Raises `BenchmarkMistake` where a
    stratum has not so many.
    """
    rng, options = random.Random(seed), [sorted({bits for bits, _ in choices.of(layer)}) for layer in layers]
    ends = [sum(layer.params * end(its) for layer, its in zip(layers, options, strict=True)) for end in (min, max)]
    strata = len(edges) - 1
    whole = sum(layer.params for layer in layers)
    found: list[list[Allocation]] = []
    for place in range(strata):
        bounds = edges[place] * whole, edges[place + 1] * whole
        wanted, those = -(-(count - place) // strata), dict[Allocation, None]()
        for _ in range((_TRIES + wanted) * (bounds[0] <= ends[1] and bounds[1] > ends[0])):
            if len(those) < wanted:
                found_one = _moved([rng.randrange(len(its)) for its in options], layers, options, choices, bounds, rng)
                those |= dict.fromkeys([found_one] if found_one else [])
        if len(those) < wanted:
            raise BenchmarkMistake(
                f"{len(those)} allocations of {', '.join(map(str, sorted(choices.weights)))} bits were found between "
                f"{edges[place]:g} and {edges[place + 1]:g} bits a weight where {wanted} are asked for: give fewer "
                f"--strata, a smaller --count, or --least and --most from {ends[0] / whole:g} to {ends[1] / whole:g}."
            )
        found.append(list(those))
    return found


def _moved(
    places: list[int],
    layers: Sequence[Layer],
    options: Sequence[Sequence[int]],
    choices: Choices,
    within: tuple[float, float],
    rng: random.Random,
) -> Allocation | None:
    """The `options` at `places`, a layer at a time moved by one until their size is `within` bounds, in bits."""
    for _ in range(_TRIES):
        bits = tuple(its[place] for its, place in zip(options, places, strict=True))
        allocation = Allocation(bits, (max(choices.activations),) * len(layers))
        size = weight_size(layers, allocation)
        if within[0] <= size < within[1]:
            return allocation
        step = 1 if size < within[0] else -1
        index = rng.randrange(len(layers))
        places[index] = min(max(places[index] + step, 0), len(options[index]) - 1)
    return None
