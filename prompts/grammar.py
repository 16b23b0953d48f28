"""The grammar under which a small model decodes, and the code that its sentences stand for.

A sentence is a JSON object with a thought and an expression: a product of factors, each a
feature to some power, a decay with depth, or a boost for one kind of layer. Every sentence
is a valid proxy on any network. Mutation and crossover have grammars of their own, made
from the parents' factors, so that a model which cannot reason still edits what is there.

A small model left to itself repeats one feature and never divides. So each grammar offers a
hand of features, powers and edits, drawn by a seed; the model chooses among them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from itertools import combinations

from tap_eval.features import Inputs

_METADATA = ("params", "macs", "in_channels", "out_channels", "kernel", "output_size", "depth")
_STATISTICS = (
    *("weight_l1", "weight_l2", "weight_std", "weight_absmax", "weight_kurtosis", "weight_entropy"),
    *("input_std", "input_absmax", "input_entropy"),
    *("activation_std", "activation_absmax", "activation_entropy", "activation_kurtosis"),
)
_POWERS = ("**0.25", "**0.5", "", "**1.5", "**2", "**-0.25", "**-0.5", "**-1", "**-2")
_BOOSTS = ("first", "last", "stride > 1", "kernel == 1", "groups > 1", "kind == 'linear'")
_FACTOR = re.compile(
    r"exp\(-?[0-9.]+ \* depth\)|\([0-9.]+ if [a-z]+(?: (?:==|>) [a-z0-9']+)? else 1\)|[a-z_0-9]+(?:\*\*-?[0-9.]+)?"
)
_TEMPLATE = '''"""{thought}"""
from math import exp


def sensitivity(layers, task):
    return [score(layer) for layer in layers]


def score(layer):
{bindings}
    return {expression}
'''
_MOST_FACTORS = 6
_POWERS_OFFERED = 4
_JOINED = 6


def features(inputs: Inputs, count: int, rng: random.Random) -> list[str]:
    """Names that an expression may use: `count` of those visible, drawn, in a fixed order."""
    names = _METADATA + (_STATISTICS if inputs == "statistics" else ())
    drawn = set(rng.sample(names, min(count, len(names))))
    return [name for name in names if name in drawn]


def initialization(names: Sequence[str], rng: random.Random) -> str:
    """GBNF of products of two or three powers, each from a third of `names`, and perhaps a decay or boost."""
    shuffled = rng.sample(names, len(names))
    slots = [_power(shuffled[start::3], rng) for start in range(3)]
    return _document(f'{slots[0]} " * " {slots[1]} (" * " {slots[2]})? (" * " extra)?', rng)


def mutation(expression: str, names: Sequence[str], rng: random.Random) -> str:
    """GBNF of one edit of `expression`: a factor replaced, dropped, given another power, or added."""
    factors = split(expression)
    place = rng.randrange(len(factors))
    before, after = factors[:place], factors[place + 1 :]
    others = [name for name in names if all(name != _name(factor) for factor in factors)]
    edits = {"replace": _joined(before, f"({_power(others, rng)} | extra)", after)}
    if (name := _name(factors[place])) is not None:
        powers = [name + power for power in _POWERS if name + power != factors[place]]
        edits["power"] = _joined(before, _any(powers), after)
    if len(factors) > 2:
        edits["drop"] = _joined(before, None, after)
    if len(factors) < _MOST_FACTORS:
        edits["add"] = _joined(factors, f"({_power(others, rng)} | extra)", [])
    return _document(edits[rng.choice(sorted(edits))], rng)


def crossover(first: str, second: str, names: Sequence[str], rng: random.Random) -> str:
    """GBNF of a few products of some factors of `first` with some of `second` that `first` lacks."""
    ours, theirs = split(first), [factor for factor in split(second) if factor not in split(first)]
    joined = {
        " * ".join([*some, *others])
        for some in _subsets(ours)
        for others in _subsets(theirs)
        if len(some) + len(others) <= _MOST_FACTORS
    }
    if not joined:
        return mutation(first, names, rng)
    return _document(_any(rng.sample(sorted(joined), min(_JOINED, len(joined)))), rng)


def code_of(sentence: str) -> tuple[str, str]:
    """The thought and the code that a sentence of a grammar stands for; raises `ValueError` for no sentence."""
    parsed = json.loads(sentence)
    thought, expression = parsed["thought"].strip(), parsed["expression"]
    split(expression)
    bound = sorted(set(re.findall(r"[a-z_0-9]*[a-z_][a-z_0-9]*", expression)) - {"exp", "if", "else", "linear"})
    raw = {"first", "last", "kind"}
    bindings = "\n".join(
        f'    {name} = layer["{name}"]' if name in raw else f'    {name} = max(layer["{name}"], 1e-9)' for name in bound
    )
    return thought, _TEMPLATE.format(thought=thought.replace('"', "'"), bindings=bindings, expression=expression)


def expression_of(code: str) -> str | None:
    """The expression in code that `code_of` made, or None for any other code."""
    found = re.search(r"\ndef score\(layer\):\n(?:    \w+ = .*\n)+    return (.+)\n", code)
    try:
        return " * ".join(split(found[1])) if found else None
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


def _joined(before: Sequence[str], middle: str | None, after: Sequence[str]) -> str:
    """A product in which `middle`, a rule, stands between literal factors."""
    if middle is None:
        return json.dumps(" * ".join([*before, *after]))
    left = json.dumps("".join(f"{factor} * " for factor in before))
    right = json.dumps("".join(f" * {factor}" for factor in after))
    return f"{left} {middle} {right}"


def _name(factor: str) -> str | None:
    """The feature of a power; None for a decay or a boost."""
    name = factor.split("**")[0]
    return name if name.isidentifier() else None


def _subsets(factors: Sequence[str]) -> list[tuple[str, ...]]:
    """All nonempty subsets of at most three factors, in order."""
    return [subset for size in (1, 2, 3) for subset in combinations(factors, size)]
