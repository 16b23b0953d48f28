"""The grammar under which a small model decodes, and the code that its sentences stand for.

A sentence is a JSON object with a thought and an expression: a product of factors, each a
feature to some power, a decay with depth, or a boost for one kind of layer. Every sentence
is a valid proxy on any network. Mutation and crossover have grammars of their own, made
from the parents' factors, so that a model which cannot reason still edits what is there.
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


def features(inputs: Inputs, count: int, rng: random.Random) -> list[str]:
    """Names that an expression may use: `count` of those visible, drawn, in a fixed order."""
    names = _METADATA + (_STATISTICS if inputs == "statistics" else ())
    drawn = set(rng.sample(names, min(count, len(names))))
    return [name for name in names if name in drawn]


def initialization(names: Sequence[str]) -> str:
    """GBNF of all products of two to four factors over the features `names`."""
    return _document('factor " * " factor (" * " factor){0,2}', names)


def mutation(expression: str, names: Sequence[str]) -> str:
    """GBNF of all expressions one edit from `expression`: a factor replaced, dropped, added or given another power."""
    factors = split(expression)
    edits: list[str] = []
    for index, factor in enumerate(factors):
        before = "".join(f"{part} * " for part in factors[:index])
        after = "".join(f" * {part}" for part in factors[index + 1 :])
        edits.append(f"{_literal(before)} factor {_literal(after)}")
        name = factor.split("**")[0]
        if name.isidentifier():
            powers = " | ".join(_literal(name + power) for power in _POWERS if name + power != factor)
            edits.append(f"{_literal(before)} ({powers}) {_literal(after)}")
        if len(factors) > 2:
            edits.append(_literal(" * ".join(factors[:index] + factors[index + 1 :])))
    if len(factors) < _MOST_FACTORS:
        edits.append(f"{_literal(expression + ' * ')} factor")
    return _document(" | ".join(edits), names)


def crossover(first: str, second: str, names: Sequence[str]) -> str:
    """GBNF of all products of some factors of `first` with some of `second` that `first` lacks."""
    ours, theirs = split(first), [factor for factor in split(second) if factor not in split(first)]
    joined = {
        " * ".join([*some, *others])
        for some in _subsets(ours)
        for others in _subsets(theirs)
        if len(some) + len(others) <= _MOST_FACTORS
    }
    return _document(" | ".join(map(_literal, sorted(joined))), names) if joined else mutation(first, names)


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


def _document(expression: str, names: Sequence[str]) -> str:
    rules = {
        "root": r'"{\"thought\": \"" thought "\", \"expression\": \"" expression "\"}"',
        "thought": "[A-Z] [a-z ,]{15,100} [.]",
        "expression": expression,
        "factor": "power | power | decay | boost",
        "power": f"({' | '.join(map(_literal, names))}) ({' | '.join(map(_literal, _POWERS))})",
        "decay": '"exp(" "-"? [1-4] " * depth)"',
        "boost": f'"(" ("0.25" | "0.5" | [2-4]) " if " ({" | ".join(map(_literal, _BOOSTS))}) " else 1)"',
    }
    return "\n".join(f"{name} ::= {rule}" for name, rule in rules.items())


def _literal(text: str) -> str:
    return json.dumps(text)


def _subsets(factors: Sequence[str]) -> list[tuple[str, ...]]:
    """All nonempty subsets of at most three factors, in order."""
    return [subset for size in (1, 2, 3) for subset in combinations(factors, size)]
