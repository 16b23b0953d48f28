"""Allocations drawn at random, as many of every size."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tap_eval.allocation.size import weight_size
from tap_eval.mistake import BenchmarkMistake
from tap_eval.preparing.layers import Layer
from tap_eval.quantization.quantizer import Allocation

_TRIES = 1000
"""at an allocation that is none of those before"""


def drawn(
    layers: Sequence[Layer], choices: Sequence[int], activation: int, edges: Sequence[float], count: int, seed: int
) -> list[list[Allocation]]:
    """In each stratum, which is between two of the `edges`, average bits a weight, as many that differ: `count` in all.

    Every layer is given one of the `choices` at random; then random layers are moved to the next choice up or down
    until the size is in the stratum. Layers are whole, activations have the bits `activation`. Raises
    `BenchmarkMistake` where a stratum has not so many.
    """
    rng, bits = random.Random(seed), sorted(choices)
    strata = len(edges) - 1
    whole = sum(layer.params for layer in layers)
    found: list[list[Allocation]] = []
    for place in range(strata):
        bounds = edges[place] * whole, edges[place + 1] * whole
        wanted, those = -(-(count - place) // strata), dict[Allocation, None]()
        for _ in range(_TRIES + wanted):
            if len(those) < wanted:
                drawn = _moved([rng.randrange(len(bits)) for _ in layers], layers, bits, activation, bounds, rng)
                those |= dict.fromkeys([drawn] if drawn else [])
        if len(those) < wanted:
            raise BenchmarkMistake(
                f"{len(those)} allocations of {', '.join(map(str, bits))} bits were found between {edges[place]:g} and "
                f"{edges[place + 1]:g} bits a weight where {wanted} are asked for: ask for fewer, or for other bits."
            )
        found.append(list(those))
    return found


def _moved(
    places: list[int],
    layers: Sequence[Layer],
    bits: Sequence[int],
    activation: int,
    within: tuple[float, float],
    rng: random.Random,
) -> Allocation | None:
    """The bits at `places`, a layer at a time moved by one choice until their size is `within` bounds, in bits."""
    for _ in range(_TRIES):
        allocation = Allocation(tuple(bits[place] for place in places), (activation,) * len(layers))
        size = weight_size(layers, allocation)
        if within[0] <= size < within[1]:
            return allocation
        step = 1 if size < within[0] else -1
        index = rng.randrange(len(layers))
        places[index] = min(max(places[index] + step, 0), len(bits) - 1)
    return None
