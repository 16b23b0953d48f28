"""The grammar under which a small model decodes, and the code that its sentences stand for.

A sentence is a JSON object with a thought and an expression: a product of factors, each a
feature to some power, a decay with depth, a boost for one kind of layer, or `channel.` with a
statistic of each output channel, which divides a layer's score among its channels. Every
sentence is a valid proxy on any network. Mutation and crossover have grammars of their own, of edits of
a parent and of geometric means of two, so that a model which cannot reason still improves
what is there.

A small model left to itself repeats one feature and never divides. So each grammar offers a
hand of features, powers and edits, drawn by a seed; the model chooses among them.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence

from tap_eval.proxies.features import Inputs

_METADATA = ("params", "macs", "in_channels", "out_channels", "kernel", "output_size", "depth")
_STATISTICS = (
    *("weight_l1", "weight_l2", "weight_std", "weight_absmax", "weight_kurtosis", "weight_entropy"),
    *("input_std", "input_absmax", "input_entropy"),
    *("activation_std", "activation_absmax", "activation_entropy", "activation_kurtosis"),
)
_CHANNEL = "channel."
_OF_CHANNELS = tuple(_CHANNEL + name for name in _STATISTICS if name.startswith(("weight_", "activation_")))
_POWERS = ("**0.25", "**0.5", "", "**1.5", "**2", "**-0.25", "**-0.5", "**-1", "**-2")
_BOOSTS = ("first", "last", "stride > 1", "kernel == 1", "groups > 1", "kind == 'linear'")
_FACTOR = re.compile(
    r"exp\(-?[0-9.]+ \* depth\)|\([0-9.]+ if [a-z]+(?: (?:==|>) [a-z0-9']+)? else 1\)"
    r"|(?:channel\.)?[a-z_0-9]+(?:\*\*-?[0-9.]+)?"
)
_PROXY = '''"""{thought}"""
from math import exp


def sensitivity(layers, task):
    return [{scorer}(layer) for layer in layers]


def score(layer):
{bindings}
    return {expression}
'''
_CHANNELS = """

def channel_scores(layer):
    rows = zip({columns})
    shares = [{shares} for {names} in rows]
    whole = score(layer) * len(shares) / sum(shares)
    return [whole * share for share in shares]
"""
_POWERS_OFFERED = 4
_STEPS = (0.5, 0.7, 1.4, 2, -0.5)
"""what a mutation multiplies a power with"""
_FRESH_POWERS = (-1, -0.5, 0.5, 1, 2)
_OFFERED = 3
_LEAST_POWER = 0.08
_FURTHEST, _FURTHEST_BOOST = 99, 7
"""so that no power is written with an exponent of ten, and no boost as zero"""
_CHANNELS_SHARE = 0.75
"""of the initial expressions that divide scores among channels"""
_CHANNELS_AGAIN = 0.3
"""of the added factors that are of channels"""


def features(inputs: Inputs, count: int, rng: random.Random, channels: bool = False) -> list[str]:
    """Names that an expression may use: `count` of those visible, drawn, and with `channels` three of channels."""
    names = _METADATA + (_STATISTICS if inputs == "statistics" else ())
    drawn = rng.sample(names, min(count, len(names)))
    of_channels = rng.sample(_OF_CHANNELS, 3) if channels and inputs == "statistics" else []
    return [name for name in (*names, *_OF_CHANNELS) if name in {*drawn, *of_channels}]


def initialization(names: Sequence[str], rng: random.Random) -> str:
    """GBNF of products of two or three powers, each from a third of `names`, and perhaps a decay, boost or channels."""
    of_layers, of_channels = _sorted_out(names)
    shuffled = rng.sample(of_layers, len(of_layers))
    slots = [_power(shuffled[start::3], rng) for start in range(3)]
    end = f' " * " {_power(of_channels, rng)}' if of_channels and rng.random() < _CHANNELS_SHARE else ""
    return _document(f'{slots[0]} " * " {slots[1]} (" * " {slots[2]})? (" * " extra)?{end}', rng)


def mutation(expression: str, names: Sequence[str], rng: random.Random) -> str:
    """GBNF of a few variants of `expression`, all with one edit of one kind: a power changed, or a factor of layers
    or of channels exchanged for a fresh one, added or dropped."""
    powers = exponents(expression)
    key = rng.choice(list(powers))
    without = {other: power for other, power in powers.items() if other != key}
    edit = rng.choice(("power", "exchange", "exchange", "add", "drop"))
    if edit == "power" or (edit == "drop" and len(powers) < 3):
        variants = [{**powers, key: powers[key] * step} for step in _STEPS]
    elif edit == "drop":
        variants = [without]
    else:
        kept = powers if edit == "add" else without
        of_channels = key.startswith(_CHANNEL) if edit == "exchange" else rng.random() < _CHANNELS_AGAIN
        fresh = _fresh(powers, names, of_channels, rng)
        variants = [{**kept, name: power} for name in fresh for power in rng.sample(_FRESH_POWERS, 2)]
    return _offer(variants, rng)


def crossover(first: str, second: str, rng: random.Random) -> str:
    """GBNF of ways to join two expressions: their geometric means, and the layers of one with the channels of the
    other."""
    ours, theirs = exponents(first), exponents(second)
    joined = [
        {key: share * ours.get(key, 0) + (1 - share) * theirs.get(key, 0) for key in {**ours, **theirs}}
        for share in (0.3, 0.5, 0.7)
    ]
    for one, other in ((ours, theirs), (theirs, ours)):
        layers = {key: power for key, power in one.items() if not key.startswith(_CHANNEL)}
        channels = {key: power for key, power in other.items() if key.startswith(_CHANNEL)}
        if layers and channels:
            joined.append(layers | channels)
    return _offer(joined, rng)


def _offer(variants: Sequence[Mapping[str, float]], rng: random.Random) -> str:
    """GBNF of a few of `variants`: of many, a small model takes the one most like what it has read."""
    texts = list(dict.fromkeys(map(product, variants)))
    return _document(_any(rng.sample(texts, min(_OFFERED, len(texts)))), rng)


def exponents(expression: str) -> dict[str, float]:
    """The expression as powers of features, the rate of its decay under "exp", and boosts as powers of 2."""
    found: dict[str, float] = {}
    for factor in split(expression):
        if decay := re.fullmatch(r"exp\((.+) \* depth\)", factor):
            key, power = "exp", float(decay[1])
        elif boost := re.fullmatch(r"\((.+?) (if .+) else 1\)", factor):
            key, power = boost[2], math.log2(float(boost[1]))
        else:
            key, _, digits = factor.partition("**")
            power = float(digits or 1)
        found[key] = found.get(key, 0.0) + power
    return found


def product(powers: Mapping[str, float]) -> str:
    """The expression with these `exponents`, to two digits; what is near zero is left out."""
    factors: list[str] = []
    for key, exact in powers.items():
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


def _fresh(powers: Mapping[str, float], names: Sequence[str], channels: bool, rng: random.Random) -> list[str]:
    """Features of channels that are not used yet, if there are any, or else of layers, and a boost."""
    of_layers, of_channels = _sorted_out([name for name in names if name not in powers])
    if channels and of_channels:
        return of_channels
    return [*rng.sample(of_layers, min(3, len(of_layers))), f"if {rng.choice(_BOOSTS)}"]


def code_of(sentence: str) -> tuple[str, str]:
    """The thought and the code that a sentence of a grammar stands for; raises `ValueError` for no sentence."""
    parsed = json.loads(sentence)
    thought, factors = parsed["thought"].strip(), split(parsed["expression"])
    of_layers, of_channels = _sorted_out(factors)
    expression = " * ".join(of_layers) or "1.0"
    bound = sorted(set(re.findall(r"[a-z_0-9]*[a-z_][a-z_0-9]*", expression)) - {"exp", "if", "else", "linear"})
    raw = {"first", "last", "kind"}
    bindings = "\n".join(
        f'    {name} = layer["{name}"]' if name in raw else f'    {name} = max(layer["{name}"], 1e-9)' for name in bound
    )
    values = {
        "thought": thought.replace("\\", "/").replace('"', "'"),
        "bindings": bindings or "    # every layer alike",
        "expression": expression,
    }
    if not of_channels:
        return thought, _PROXY.format(**values, scorer="score")
    names = sorted({(_name(factor) or "").removeprefix(_CHANNEL) for factor in of_channels})
    return thought, _PROXY.format(**values, scorer="channel_scores") + _CHANNELS.format(
        columns=", ".join(f'layer["channels"]["{name}"]' for name in names),
        names=", ".join(names) + ("," if len(names) == 1 else ""),
        shares=" * ".join(
            re.sub(r"[a-z_0-9]*[a-z][a-z_0-9]*", r"max(\g<0>, 1e-9)", factor.removeprefix(_CHANNEL), count=1)
            for factor in of_channels
        ),
    )


def expression_of(code: str) -> str | None:
    """The expression in code that `code_of` made, or None for any other code."""
    of_layers = re.search(r"\ndef score\(layer\):\n(?:    .+\n)+?    return (.+)\n", code)
    of_channels = re.search(r"\n    shares = \[(.+) for .+ in rows\]\n", code)
    if not of_layers:
        return None
    try:
        factors = [] if of_layers[1] == "1.0" else split(of_layers[1])
        if of_channels:
            factors += [_CHANNEL + factor for factor in split(re.sub(r"max\((\w+), 1e-9\)", r"\1", of_channels[1]))]
        exponents(" * ".join(factors))
        return " * ".join(factors) or None
    except ValueError:
        return None


def split(expression: str) -> list[str]:
    """The factors of an expression; raises `ValueError` when it is none of the grammar's."""
    factors = _FACTOR.findall(expression)
    if " * ".join(factors) != expression:
        raise ValueError(f"not a product of factors: {expression}")
    return factors


def _document(expression: str, rng: random.Random) -> str:
    boosts = rng.sample(_BOOSTS, 3)
    rules = {
        "root": r'"{\"thought\": \"" thought "\", \"expression\": \"" expression "\"}"',
        "thought": "[A-Z] [a-z ,]{15,100} [.]",
        "expression": expression,
        "extra": f'"exp({rng.choice(("", "-"))}" [1-4] " * depth)" | "({rng.choice(("0.25", "0.5", "2", "4"))} if " '
        f'{_any(boosts)} " else 1)"',
    }
    return "\n".join(f"{name} ::= {rule}" for name, rule in rules.items())


def _power(names: Sequence[str], rng: random.Random) -> str:
    """One of `names` to one of a few drawn powers."""
    return f"{_any(names)} {_any(rng.sample(_POWERS, _POWERS_OFFERED))}"


def _any(texts: Sequence[str]) -> str:
    return f"({' | '.join(map(json.dumps, texts))})"


def _name(factor: str) -> str | None:
    """The feature of a power; None for a decay or a boost."""
    name = factor.split("**")[0]
    return name if name.removeprefix(_CHANNEL).isidentifier() else None


def _sorted_out(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names or factors of layers, and those of channels."""
    of_channels = [name for name in names if name.startswith(_CHANNEL)]
    return [name for name in names if name not in of_channels], of_channels
