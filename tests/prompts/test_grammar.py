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
from prompts.expression import crossovers, exponents, mutations, product, split
from tap_eval.measuring.bench import Bench
from tests.hostile.memory import taking_at_most
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
    again = product(exponents(expression))
    assert exponents(again) == pytest.approx(exponents(expression), abs=0.01)


def test_crossovers_lie_on_the_line_through_both_and_some_weigh_channels_otherwise() -> None:
    first, second = "params**-1 * channel.weight_std**2", "params * weight_l2**2"
    made = crossovers(first, second, random.Random(0))
    assert len(made) > 20
    apart, beyond = 0, 0
    for powers in map(exponents, made):
        share = (1 - powers.get("params", 0)) / 2
        assert powers.get("weight_l2", 0) == pytest.approx(2 * (1 - share), abs=0.17)
        apart += abs(powers.get("channel.weight_std", 0) - 2 * share) > 0.2
        beyond += not 0 <= share <= 1
    assert len(made) / 4 < apart < len(made) * 3 / 4
    assert beyond > 5


def test_mutations_are_a_few_edits_away() -> None:
    rng = random.Random(0)
    names = grammar.features("statistics", 9, rng, channels=True)
    expression = "exp(-2 * depth) * macs**0.25 * channel.weight_kurtosis"
    made = mutations(expression, names, rng)
    assert len(made) > 50
    assert expression not in made
    before = set(split(expression))
    for each in made:
        after = set(split(each))
        assert max(len(before - after), len(after - before)) <= 3
        assert {key for key in exponents(each) if key != "exp" and not key.startswith("if ")} <= {
            "macs", "channel.weight_kurtosis", "depth", *names,
        }  # fmt: skip


def test_edits_of_edits_never_leave_the_grammar() -> None:
    rng = random.Random(0)
    expression = "(0.25 if first else 1) * exp(-4 * depth) * macs"
    for _ in range(300):
        powers = {key: power * rng.choice((2, -2, 1.4)) for key, power in exponents(expression).items()}
        expression = product(powers)
        assert exponents(expression).keys() == powers.keys()


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
    hands = {"mutation": mutations(second, names, rng)[:3], "crossover": crossovers(first, second, rng)[:3]}
    grammars = {"initialization": grammar.initialization(names, rng)}
    grammars |= {template: grammar.choice(hand, rng) for template, hand in hands.items()}
    assert start()  # once for all
    for template, sentences in grammars.items():
        (call,) = ask(seed, sentences, f"Write a {template}.")
        expression = grammar.expression_of(call["args"]["code"])
        assert expression
        if template in hands:
            assert expression in hands[template]


def test_the_same_seed_gives_the_same_sentence_whoever_asked_before() -> None:
    names = grammar.features("metadata", 9, random.Random(0))
    sentences = grammar.initialization(names, random.Random(0))

    first = ask(1, sentences)
    ask(2, sentences)
    assert ask(1, sentences) == first


def test_prompts_are_not_kept_once_they_are_answered() -> None:
    sentences = grammar.initialization(grammar.features("metadata", 9, random.Random(0)), random.Random(0))
    prompts = [" ".join(f"layer {seed}.{each}" for each in range(250)) for seed in range(4)]
    ask(0, sentences, prompts[0])

    with taking_at_most(20 * 2**20):  # what the model computes of one of them takes 40 MiB
        for seed in (1, 2, 3):
            ask(seed, sentences, prompts[seed])


def test_metadata_alone_offers_no_statistics() -> None:
    names = grammar.features("metadata", 99, random.Random(0), channels=True)
    assert names == list(grammar._METADATA)


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render("mutation", failures=[])
