"""Programs and results that nobody would write: whatever they are, what reads them gives its own answer."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.answer import LONGEST_TEXT, MOST_CALLS, Answer
from agents.reading import arguments, code, written
from tap_eval.proxies.proxy import Failure, Rejection, checked_scores
from tests.hostile.test_snippets import CALL, LAYERS, computes
from tools.sandbox import MontySandbox, forbidden, plain

fuzzed = settings(
    derandomize=True,  # the same examples each time, so that a change fails or passes by itself
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans(), st.none())
PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=12,
)
ATOMS = st.sampled_from(
    ["layers", "task", "x['std']", "1", "-0.5", "1e308", "'a'", "[]", "{}", "()", "None", "True", "math.pi", "nothing"]
)
"""operands, some of which are not there or have no such operator"""
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "<", "and", "in"]), inner).map(
            lambda found: f"({found[0]} {found[1]} {found[2]})"
        ),
        st.tuples(st.sampled_from(["len", "sum", "sorted", "max", "math.log", "float", "str", "list"]), inner).map(
            lambda found: f"{found[0]}({found[1]})"
        ),
        st.tuples(inner, inner).map(lambda found: f"{found[0]}[{found[1]}]"),
        inner.map(lambda found: f"[{found} for x in layers]"),
        st.lists(inner, max_size=3).map(lambda found: f"[{', '.join(found)}]"),
    ),
    max_leaves=8,
)


@fuzzed
@given(st.one_of(st.text(), st.binary().map(lambda raw: raw.decode("latin-1")), EXPRESSIONS))
def test_any_text_is_read_and_refused_or_may_run(text: str) -> None:
    found = forbidden(text)
    assert isinstance(found, Rejection)  # it defines no sensitivity
    assert found.message.isprintable()


@fuzzed
@given(EXPRESSIONS)
def test_any_program_gives_scores_or_a_failure_with_a_name(monty: MontySandbox, expression: str) -> None:
    program = f"import math\ndef sensitivity(layers, task):\n    return [{expression} for x in layers]\n"
    assert forbidden(program) is None
    value = monty.run(program, CALL, {"layers": LAYERS, "task": {"classes": 2}})
    found = value if isinstance(value, Rejection) else checked_scores(value, [2, 2], by_channel=True)
    if isinstance(found, Rejection):
        assert found.failure in Failure
        assert found.message
    else:
        assert all(math.isfinite(score if isinstance(score, float) else sum(score)) for score in found)


@fuzzed
@given(PLAIN)
def test_any_plain_data_comes_back_as_it_is_or_is_refused(monty: MontySandbox, value: Any) -> None:
    try:
        expected: object = plain(value)
    except ValueError as error:
        expected = Rejection(Failure.WRONG_SHAPE, str(error))
    assert repr(monty.run("", "given", {"given": value})) == repr(expected)  # NaN is no NaN's equal


@fuzzed
@given(st.one_of(PLAIN, st.lists(st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)), min_size=2, max_size=2)))
def test_any_result_is_scores_or_a_failure_with_a_name(value: Any) -> None:
    for by_channel in (False, True):
        found = checked_scores(value, [1, 3], by_channel)
        if not isinstance(found, Rejection):
            assert len(found) == 2
            everything = [number for score in found for number in (score if isinstance(score, list) else [score])]
            assert all(math.isfinite(number) for number in everything)
            assert len(set(everything)) > 1


@fuzzed
@given(st.text(alphabet="<>[]{}\"'`\\/ :,\n\tacdefhilnortvy_\ud800\0", max_size=300))
def test_any_text_of_a_model_is_an_answer_within_its_bounds(text: str) -> None:
    said, calls = written(text, ["Proposal", "run_code"])
    answer = Answer.model_validate({"content": said, "tool_calls": [{**call, "id": ""} for call in calls]})
    assert len(answer.content) <= LONGEST_TEXT
    assert len(answer.tool_calls) <= MOST_CALLS
    assert Answer.model_validate_json(answer.model_dump_json()) == answer
    assert isinstance(code(text), str)


@fuzzed
@given(PLAIN)
def test_any_arguments_are_an_object_or_none(value: Any) -> None:
    for given_as in (value, json.dumps(value), json.dumps(json.dumps(value))):
        found = arguments(given_as)
        assert found is None or isinstance(found, dict)


def test_the_sandbox_is_as_it_was(monty: MontySandbox) -> None:
    assert computes(monty)
