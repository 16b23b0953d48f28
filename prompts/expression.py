"""Proxies as expressions, and what can be made of one or of two.

An expression is a product of factors, each a feature to some power, a decay with depth, a boost for one kind of layer,
or `channel.` with a statistic of each output channel, which divides a layer's score among its channels. So an
expression is a point, its exponents, and edits and means of expressions are expressions.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence

CHANNEL = "channel."
BOOSTS = ("first", "last", "stride > 1", "kernel == 1", "groups > 1", "kind == 'linear'")
_FACTOR = re.compile(
    r"exp\(-?[0-9.]+ \* depth\)|\([0-9.]+ if [a-z]+(?: (?:==|>) [a-z0-9']+)? else 1\)"
    r"|(?:channel\.)?[a-z_0-9]+(?:\*\*-?[0-9.]+)?"
)
_MUTATIONS, _EDITS = 60, 3
"""of an expression, and edits of each at most"""
_CROSSOVERS = 40
_BEYOND = 0.7
"""how far from either parent a crossover may lie on the far side, in distances between them"""
_STEPS = (0.5, 0.7, 1.4, 2, -0.5)
"""what an edit multiplies a power with"""
_FRESH_POWERS = (-1, -0.5, 0.5, 1, 2)
_CHANNELS_AGAIN = 0.3
"""of the added factors that are of channels"""
_LEAST_POWER = 0.08
_FURTHEST, _FURTHEST_BOOST = 99, 7
"""so that no power is written with an exponent of ten, and no boost as zero"""


def mutations(expression: str, names: Sequence[str], rng: random.Random) -> list[str]:
    """Many that are a few edits from `expression`: a power changed, or a factor of layers or of channels exchanged for
    a fresh one, of `names`, added or dropped."""
    made: list[str] = []
    whole = exponents(expression)
    for _ in range(_MUTATIONS):
        powers: Mapping[str, float] = whole
        for _ in range(rng.randint(1, _EDITS)):
            powers = _edited(powers, names, rng)
        made.append(product(powers))
    return _others(made, expression)


def crossovers(first: str, second: str, rng: random.Random) -> list[str]:
    """Many on the line through two expressions, between them and beyond: their geometric means with weights that
    sum to one. Half of them weigh factors of channels otherwise than those of layers."""
    ours, theirs = exponents(first), exponents(second)
    made: list[str] = []
    for _ in range(_CROSSOVERS):
        of_layers, of_channels = (rng.uniform(-_BEYOND, 1 + _BEYOND) for _ in range(2))
        if rng.random() < 0.5:
            of_channels = of_layers
        shares = {key: of_channels if key.startswith(CHANNEL) else of_layers for key in {**ours, **theirs}}
        made.append(
            product({key: share * ours.get(key, 0) + (1 - share) * theirs.get(key, 0) for key, share in shares.items()})
        )
    return _others(made, first, second)


def _edited(powers: Mapping[str, float], names: Sequence[str], rng: random.Random) -> dict[str, float]:
    key, edit = rng.choice(list(powers)), rng.choice(("power", "exchange", "add", "drop"))
    if edit == "power" or (edit == "drop" and len(powers) < 3):
        return {**powers, key: powers[key] * rng.choice(_STEPS)}
    kept = {other: power for other, power in powers.items() if other != key or edit == "add"}
    if edit == "drop":
        return kept
    of_channels = key.startswith(CHANNEL) if edit == "exchange" else rng.random() < _CHANNELS_AGAIN
    return {**kept, rng.choice(_fresh(powers, names, of_channels, rng)): rng.choice(_FRESH_POWERS)}


def _fresh(powers: Mapping[str, float], names: Sequence[str], channels: bool, rng: random.Random) -> list[str]:
    """Features of channels that are not used yet, if there are any, or else of layers, and a boost."""
    of_layers, of_channels = sorted_out([name for name in names if name not in powers])
    if channels and of_channels:
        return of_channels
    return [*rng.sample(of_layers, min(3, len(of_layers))), f"if {rng.choice(BOOSTS)}"]


def _others(made: Sequence[str], *parents: str) -> list[str]:
    """Each once, without the parents unless nothing else was made."""
    return [each for each in dict.fromkeys(made) if each not in parents] or list(parents)


def exponents(expression: str) -> dict[str, float]:
    """The expression as powers of features, the rate of its decay under "exp", and boosts as powers of 2."""
    found: dict[str, float] = {}
    for factor in split(expression):
        if factor.startswith("exp("):
            key, power = "exp", float(factor.removeprefix("exp(").removesuffix(" * depth)"))
        elif factor.startswith("("):
            number, _, condition = factor.removeprefix("(").removesuffix(" else 1)").partition(" if ")
            key, power = f"if {condition}", math.log2(float(number))
        else:
            key, _, digits = factor.partition("**")
            power = float(digits or 1)
        found[key] = found.get(key, 0.0) + power
    return found


def product(powers: Mapping[str, float]) -> str:
    """The expression with these `exponents`, to two digits, channels last; what is near zero is left out."""
    factors: list[str] = []
    for key, exact in sorted(powers.items(), key=lambda item: item[0].startswith(CHANNEL)):
        furthest = _FURTHEST_BOOST if key.startswith("if ") else _FURTHEST
        power = round(min(max(exact, -furthest), furthest), 2)
        if abs(power) < _LEAST_POWER:
            continue
        if key == "exp":
            factors.append(f"exp({power:g} * depth)")
        elif key.startswith("if "):
            factors.append(f"({2**power:.2f} {key} else 1)")
        else:
            factors.append(key if power == 1 else f"{key}**{power:g}")
    return " * ".join(factors) or "depth"


def split(expression: str) -> list[str]:
    """The factors of an expression; raises `ValueError` when it is none of the grammar's."""
    factors = _FACTOR.findall(expression)
    if " * ".join(factors) != expression:
        raise ValueError(f"not a product of factors: {expression}")
    return factors


def sorted_out(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names or factors of layers, and those of channels."""
    of_channels = [name for name in names if name.startswith(CHANNEL)]
    return [name for name in names if name not in of_channels], of_channels
