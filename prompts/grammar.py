"""The grammar under which a small model decodes, and the code that its sentences stand for.

A sentence is a JSON object with a thought and an expression, as `prompts.expression` has them. Every
sentence is a valid proxy on any network. For mutation and crossover the expressions are given, so that
a model which cannot reason still improves what is there.

A small model left to itself repeats one feature and never divides. So each grammar offers a
hand of features and powers, drawn by a seed, or of expressions; the model chooses among them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from functools import lru_cache

from prompts.expression import BOOSTS, CHANNEL, exponents, sorted_out, split
from tap_eval.proxies.features import Inputs

_METADATA = ("params", "macs", "in_channels", "out_channels", "kernel", "output_size", "depth")
_STATISTICS = (
    *("weight_l1", "weight_l2", "weight_std", "weight_absmax", "weight_kurtosis", "weight_entropy"),
    *("input_std", "input_absmax", "input_entropy"),
    *("activation_std", "activation_absmax", "activation_entropy", "activation_kurtosis"),
)
_OF_CHANNELS = tuple(CHANNEL + name for name in _STATISTICS if name.startswith(("weight_", "activation_")))
_POWERS = ("**0.25", "**0.5", "", "**1.5", "**2", "**-0.25", "**-0.5", "**-1", "**-2")
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
_CHANNELS_SHARE = 0.75
"""of the initial expressions that divide scores among channels"""


def features(inputs: Inputs, count: int, rng: random.Random, channels: bool = False) -> list[str]:
    """Names that an expression may use: `count` of those visible, drawn, and with `channels` three of channels."""
    names = _METADATA + (_STATISTICS if inputs == "statistics" else ())
    drawn = rng.sample(names, min(count, len(names)))
    of_channels = rng.sample(_OF_CHANNELS, 3) if channels and inputs == "statistics" else []
    return [name for name in (*names, *_OF_CHANNELS) if name in {*drawn, *of_channels}]


def initialization(names: Sequence[str], rng: random.Random) -> str:
    """GBNF of products of two or three powers, each from a third of `names`, and perhaps a decay, boost or channels."""
    of_layers, of_channels = sorted_out(names)
    shuffled = rng.sample(of_layers, len(of_layers))
    slots = [_power(shuffled[start::3], rng) for start in range(3)]
    end = f' " * " {_power(of_channels, rng)}' if of_channels and rng.random() < _CHANNELS_SHARE else ""
    return _document(f'{slots[0]} " * " {slots[1]} (" * " {slots[2]})? (" * " extra)?{end}', rng)


def choice(expressions: Sequence[str], rng: random.Random) -> str:
    """GBNF of `expressions`, one of which the model is to take: few, for of many it takes the one most like what it
    has read."""
    return _document(_any(expressions), rng)


def code_of(sentence: str) -> tuple[str, str]:
    """The thought and the code that a sentence of a grammar stands for; raises `ValueError` for no sentence."""
    parsed = json.loads(sentence)
    thought, factors = parsed["thought"].strip(), split(parsed["expression"])
    of_layers, of_channels = sorted_out(factors)
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
    names = sorted({(_name(factor) or "").removeprefix(CHANNEL) for factor in of_channels})
    return thought, _PROXY.format(**values, scorer="channel_scores") + _CHANNELS.format(
        columns=", ".join(f'layer["channels"]["{name}"]' for name in names),
        names=", ".join(names) + ("," if len(names) == 1 else ""),
        shares=" * ".join(
            re.sub(r"[a-z_0-9]*[a-z][a-z_0-9]*", r"max(\g<0>, 1e-9)", factor.removeprefix(CHANNEL), count=1)
            for factor in of_channels
        ),
    )


@lru_cache(512)  # of the latest that were judged, and of parents
def expression_of(code: str) -> str | None:
    """The expression in code that `code_of` made, or None for any other code."""
    of_layers = re.search(r"\ndef score\(layer\):\n(?:    .+\n)+?    return (.+)\n", code)
    of_channels = re.search(r"\n    shares = \[(.+) for .+ in rows\]\n", code)
    if not of_layers:
        return None
    try:
        factors = [] if of_layers[1] == "1.0" else split(of_layers[1])
        if of_channels:
            factors += [CHANNEL + factor for factor in split(re.sub(r"max\((\w+), 1e-9\)", r"\1", of_channels[1]))]
        exponents(" * ".join(factors))
        return " * ".join(factors) or None
    except ValueError:
        return None


def _document(expression: str, rng: random.Random) -> str:
    boosts = rng.sample(BOOSTS, 3)
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
    return name if name.removeprefix(CHANNEL).isidentifier() else None
