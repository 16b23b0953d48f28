"""Every sentence of a grammar is a valid proxy, and evolution can read its own code again."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from jinja2 import UndefinedError

from agents.account import Account, Conversation
from agents.embedded import start
from agents.models import LanguageModel
from prompts import grammar, render
from tap_eval.measuring.bench import Bench
from tools.evaluation import Scored, score
from tools.sandbox import MontySandbox, forbidden

EXPRESSIONS = [
    "params**-0.5 * weight_l2",
    "exp(-2 * depth) * macs**0.25 * (4 if first else 1)",
    "input_std**2 * (0.5 if kind == 'linear' else 1) * channel.weight_kurtosis**-1",
    "depth * channel.weight_l2 * channel.activation_std**0.5",
    "channel.weight_absmax**2",
]


def sentence(expression: str) -> str:
    return json.dumps({"thought": 'It says "so" \\ and ends.', "expression": expression})


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_sentence_is_a_proxy_that_can_be_read_again(expression: str, bench: Bench, sandbox: MontySandbox) -> None:
    _, code = grammar.code_of(sentence(expression))
    assert forbidden(code) is None
    assert grammar.expression_of(code) == expression
    assert isinstance(score(code, [bench], sandbox), Scored)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_is_its_exponents(expression: str) -> None:
    again = grammar.product(grammar.exponents(expression))
    assert grammar.exponents(again) == pytest.approx(grammar.exponents(expression), abs=0.01)


def test_a_crossover_takes_means_or_the_layers_of_one_and_the_channels_of_the_other() -> None:
    first, second = "params**-1 * channel.weight_std", "params * weight_l2**2"
    offered = "".join(grammar.crossover(first, second, random.Random(seed)) for seed in range(20))
    assert '"params * weight_l2**2 * channel.weight_std"' in offered
    assert '"channel.weight_std**0.5 * weight_l2"' in offered


def test_edits_of_edits_never_leave_the_grammar() -> None:
    rng = random.Random(0)
    expression = "(0.25 if first else 1) * exp(-4 * depth) * macs"
    for _ in range(300):
        powers = {key: power * rng.choice((2, -2, 1.4)) for key, power in grammar.exponents(expression).items()}
        expression = grammar.product(powers)
        assert grammar.exponents(expression).keys() == powers.keys()


def test_a_foreign_proxy_has_no_expression() -> None:
    assert grammar.expression_of("def sensitivity(layers, task):\n    return [1.0 for _ in layers]\n") is None
    with pytest.raises(ValueError, match="not a product"):
        grammar.code_of(sentence("params + 1"))


def ask(seed: int, sentences: str, text: str = "Write.") -> list[Any]:
    """The tool calls with which the embedded model answers, outside of any run."""
    conversation = Conversation(Account(), "", "embedded")
    answer = LanguageModel("embedded").chat(conversation, seed, sentences).invoke([("user", text)])
    return answer.tool_calls


@pytest.mark.parametrize("seed", range(4))
def test_the_model_decodes_valid_sentences_under_every_grammar(seed: int) -> None:
    rng = random.Random(seed)
    names = grammar.features("statistics", 9, rng, channels=True)
    first, second = "params**-0.5 * weight_l2", "exp(-2 * depth) * macs**0.25 * channel.weight_kurtosis"
    grammars = {
        "initialization": grammar.initialization(names, rng),
        "mutation": grammar.mutation(second, names, rng),
        "crossover": grammar.crossover(first, second, rng),
    }
    assert start()  # once for all
    for template, sentences in grammars.items():
        (call,) = ask(seed, sentences, f"Write a {template}.")
        expression = grammar.expression_of(call["args"]["code"])
        assert expression
        if template == "mutation":
            changed = set(grammar.split(expression)) ^ set(grammar.split(second))
            assert 1 <= len(changed) <= 2


def test_the_same_seed_gives_the_same_sentence_whoever_asked_before() -> None:
    names = grammar.features("metadata", 9, random.Random(0))
    sentences = grammar.initialization(names, random.Random(0))

    first = ask(1, sentences)
    ask(2, sentences)
    assert ask(1, sentences) == first


def test_metadata_alone_offers_no_statistics() -> None:
    names = grammar.features("metadata", 99, random.Random(0), channels=True)
    assert names == list(grammar._METADATA)


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render("mutation", failures=[])
