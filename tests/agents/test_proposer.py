"""A large model that calls tools and repairs, through the real client against a scripted server."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import convert_to_messages

from agents.assignment import Assignment, Outcome, Parent
from agents.briefing import blocks, briefing
from agents.models import LanguageModel, ModelMistake
from agents.proposer import Attempt, Proposer
from prompts import grammar
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.latency import Latencies
from tap_eval.baselines.baselines import baselines
from tap_eval.images.images import Splits
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.networks.digits import DigitsCNN
from tap_eval.preparing.layers import Layer
from tap_eval.proxies.features import visible
from tap_eval.proxies.fitness import FitnessWeights, rank_correlation
from tap_eval.proxies.proxy import Failure, Proxy, Rejection
from tests.agents.scripted import Answer, ChatServer, proposal, tool_call
from tools.evaluation import Known, Scored, score
from tools.sandbox import MontySandbox
from tools.toolbox import TEN_SECONDS, allowance_for, make_tools

GOOD = "def sensitivity(layers, task):\n    return [1 / layer['params'] for layer in layers]\n"
OTHER = "def sensitivity(layers, task):\n    return [layer['depth'] for layer in layers]\n"
SPLIT = "def sensitivity(layers, task):\n    return [[n**2 for n in x['channels']['weight_l2']] for x in layers]\n"
OLD = Outcome("p001", "initialization", "An old thought.", 0.4, 0.875, 0.25)
BROKEN = "def sensitivity(layers, task):\n    return [1 / 0 for layer in layers]\n"


def propose(
    script: list[Answer], bench: Bench, sandbox: MontySandbox, known: Known | None = None, **options: Any
) -> tuple[Attempt, list[dict[str, Any]]]:
    answers = iter(script)
    with ChatServer(lambda _: next(answers)) as server:
        proposer = Proposer(LanguageModel("scripted", server.url), [bench], sandbox, **options)
        parent = Parent("p003", Proxy("Small layers matter.", OTHER), 0.5, [0.9], [0.12], [300], [0.3], [[4.0] * 10])
        assignment = Assignment("mutation", (parent,), (OLD,), ("error: line 2: no.",), seed=1)
        return proposer.propose(assignment, known or Known({})), server.asked


def said(request: dict[str, Any]) -> str:
    return "\n".join(str(message["content"]) for message in request["messages"])


def test_an_agent_tries_code_measures_and_submits(bench: Bench, sandbox: MontySandbox) -> None:
    script = [tool_call("run_code", code=BROKEN), tool_call("measure", code=GOOD), proposal("Because.", GOOD)]
    attempt, asked = propose(script, bench, sandbox)
    assert attempt.proxy == Proxy("Because.", GOOD)
    assert isinstance(attempt.outcome, Scored)
    assert (attempt.rounds, attempt.tokens, attempt.tool_calls) == (1, 45, ("run_code", "measure"))
    assert "error: line 2: ZeroDivisionError" in said(asked[1])
    assert "digits: accuracy 0." in said(asked[2])
    kept = convert_to_messages(json.loads(json.dumps(attempt.conversation)))
    assert [message.type for message in kept[:5]] == ["human", "ai", "tool", "ai", "tool"]
    assert [call["args"]["code"] for message in kept[1:4:2] for call in message.tool_calls] == [BROKEN, GOOD]


def test_tools_answer_with_a_table_of_layers_and_with_what_the_parent_achieves(
    channel_bench: Bench, sandbox: MontySandbox
) -> None:
    script = [tool_call("run_code", code=SPLIT), tool_call("measure", code=SPLIT), proposal("Because.", GOOD)]
    _, asked = propose(script, channel_bench, sandbox)
    tried, measured = (str(request["messages"][-1]["content"]) for request in asked[1:])
    lines = [line.split(" | ") for line in tried.splitlines() if line.startswith("| ")]
    assert lines[0] == ["| #", "layer", "kind", "weights", "score", "bits |"]
    layers = channel_bench.layers
    assert [line[1:4] for line in lines[1:]] == [[each.name, each.kind, f"{each.params:,}"] for each in layers]
    mixed = [line[5].removesuffix(" |").split(", ") for line in lines[1:] if " x " in line[5]]
    assert mixed
    for bits, layer in zip([line[5].removesuffix(" |") for line in lines[1:]], layers, strict=True):
        if " x " in bits:
            assert sum(int(part.split(" x ")[1]) for part in bits.split(", ")) == layer.out_channels
    assert "digits, p003: accuracy 0.9000, KL divergence from full precision 0.1200 nats" in measured
    assert tried in measured


def test_the_prompt_holds_the_contract_the_features_and_the_context(bench: Bench, sandbox: MontySandbox) -> None:
    _, asked = propose([proposal("Because.", GOOD)], bench, sandbox)
    text = said(asked[0])
    for part in (
        "`sensitivity(layers, task)`", "`weight_kurtosis`: weights: fourth", "- Imports: `math`", "`bits`: list of",
        "digits on digits\n10 layers, 7,624 weights", "p003: fitness 0.5000", "Small layers matter.",
        "layer['depth']", "error: line 2: no.", "accuracy 0.9000, KL divergence from full precision 0.1200 nats",
    ):  # fmt: skip
        assert part in text


def test_the_page_is_the_same_for_every_call_and_has_the_figures_of_the_run(
    channel_bench: Bench, sandbox: MontySandbox
) -> None:
    fitness = FitnessWeights(0.25, worth="kl")
    script = [tool_call("run_code", code=GOOD), proposal("Because.", GOOD)]
    _, asked = propose(script, channel_bench, sandbox, fitness=fitness, seed=3)
    _, others = propose([proposal("Because.", OTHER)], channel_bench, sandbox, fitness=fitness, seed=3)
    pages = {request["messages"][0]["content"] for request in (*asked, *others)}
    (page,) = pages
    assert "`fitness = 0.25 * rho + 0.75 * worth`, with `worth = exp(-KL)`" in page
    assert "3 levels at 2 bits, 15 levels at 4 bits and 255 levels at 8 bits" in page
    assert "cut into 4 groups" in page
    full = channel_bench.searched(None)
    assert f"| full precision | {full.top1:.4f} | 0.0000 |" in page
    for each in baselines(channel_bench, 3):
        if len(each.allocations) == 1:
            found = channel_bench.searched(each.allocations[0])
            assert f"| {found.top1:.4f} | {found.kl:.4f} |" in next(
                line for line in page.splitlines() if line.startswith(f"| {each.label}")
            )
    for layer, features in zip(channel_bench.layers, channel_bench.features, strict=True):
        line = next(line for line in page.splitlines() if line.startswith(f"| {layer.index} | {layer.name} |"))
        noise = sum(features["rounding_error"]["2"]) / sum(std**2 for std in features["channels"]["activation_std"])
        assert line.startswith(f"| {layer.index} | {layer.name} | {layer.kind} |")
        assert line.endswith(f"| {noise:.3g} |")
    assert "| noise at 2 bits |" in page
    assert not any(f"{error:.4g}" in page for error in channel_bench.layer_errors)
    second = channel_bench.at(Budget.parse("4bit"), "digits at 4bit")
    both = briefing([channel_bench, second], fitness, 1, 3)
    assert "## digits at 4bit on" in both
    assert "Its layers are those of digits." in both
    assert both.count(f"| 0 | {channel_bench.layers[0].name} |") == 1


def test_where_no_bits_that_are_the_same_everywhere_are_fast_enough_the_page_is_without_them(
    network: DigitsCNN, splits: Splits, cache: Path, bench: Bench, tmp_path: Path
) -> None:
    slow = {bench.layers[0].name: (5, 3, 1), bench.layers[1].name: (1, 3, 5)}
    rows = [
        f"{layer.name},{bits},8,{ms}"
        for layer in bench.layers
        for bits, ms in zip((2, 4, 8), slow.get(layer.name, (0.1, 0.1, 0.1)), strict=True)
    ]
    (tmp_path / "device.csv").write_text("\n".join(["layer,weight_bits,activation_bits,ms", *rows]))
    task = Task(Choices(), Budget.parse("4ms"), latencies=Latencies.read(tmp_path / "device.csv"))
    page = briefing(
        [Bench("digits", network, splits, task, Ledger(cache / "ledger.sqlite"))], FitnessWeights(0.25), 1, 3
    )
    assert "| earlier layers get more" in page
    assert "| uniform" not in page


def test_of_proxies_that_are_judged_by_what_was_measured_before_agents_see_no_accuracy(
    bench: Bench, sandbox: MontySandbox
) -> None:
    given = bench.at(bench.task.budget)
    given.foretelling = lambda scores: rank_correlation(scores, bench.layer_errors)
    page = briefing([given], FitnessWeights(0.25, worth="benchmark"), 1, 3)
    assert "`fitness = 0.25 * rho + 0.75 * worth`, with `worth = foretelling`" in page
    assert "- `foretelling`: how well scores foretell the KL of many allocations" in page
    parent = Parent("p003", Proxy("Small.", OTHER), 0.5, [], [], [], [0.3], [[4.0] * 10], [0.25])
    before = Outcome("p001", "mutation", "Old.", 0.4, foretelling=0.5, parents={"p000": 0.125}, by="foretelling")
    asked = Assignment("mutation", (parent,), (before,), (), seed=1).question(["digits"])
    assert "- digits: foretelling 0.2500, rank correlation with the layer errors 0.300; bits [4.0" in asked
    assert "- p001 (mutation of p000, foretelling 0.1250): foretelling 0.5000, rho 0.000, fitness 0.4000. Old." in asked
    _, measure, _ = make_tools([given], sandbox, 1, {"p003": parent.measured})
    scores = [1 / layer.params for layer in bench.layers]
    rho = rank_correlation(scores, bench.layer_errors)
    lines = measure.invoke({"code": GOOD}).splitlines()
    assert lines[0] == f"digits: foretelling {rho:.4f}, rank correlation with the layer errors {rho:.3f}"
    assert lines[1] == "digits, p003: foretelling 0.2500, rank correlation with the layer errors 0.300"


def test_features_of_chosen_layers_are_shown_and_what_there_is_instead_of_others(
    bench: Bench, sandbox: MontySandbox
) -> None:
    every = [layer.name for layer in bench.layers]
    script = [tool_call("show_features", layers=layers) for layers in (["stem.0", "9"], every, ["nowhere"])]
    _, asked = propose([*script, proposal("Because.", GOOD)], bench, sandbox)
    chosen, most, none = (str(request["messages"][-1]["content"]) for request in asked[1:])
    shown = [json.loads(line) for line in chosen.splitlines()]
    assert [each["name"] for each in shown] == ["stem.0", "classifier"]
    for each in shown:
        assert {"network", *visible("statistics")} == each.keys()
        least, *_, greatest = each["channels"]["weight_l2"]
        whole = bench.features[each["index"]]["channels"]
        assert isinstance(whole, dict)
        assert (least, greatest) == pytest.approx((min(whole["weight_l2"]), max(whole["weight_l2"])), rel=1e-3)
    assert most.splitlines()[-1] == "4 more were left out: ask for fewer."
    assert none.startswith("there is no layer nowhere; the layers are stem.0, ")


def test_layers_of_a_deep_network_share_a_line_by_their_block(bench: Bench) -> None:
    def layers(names: Sequence[str]) -> list[Layer]:
        return [replace(bench.layers[0], name=name, block=name.rpartition(".")[0]) for name in names]

    assert all(len(each) == 1 for each in blocks(layers([f"a.{index}" for index in range(60)])))
    deep = layers([f"stage{index // 20}.{index // 2 % 10}.conv{index % 2}" for index in range(100)])
    assert [len(each) for each in blocks(deep)] == [2] * 50
    flat = layers([f"features.{index}.conv" for index in range(100)])
    assert [len(each) for each in blocks(flat)] == [100]


def test_a_failure_goes_back_and_is_repaired(bench: Bench, sandbox: MontySandbox) -> None:
    attempt, asked = propose([proposal("One.", BROKEN), proposal("Two.", GOOD)], bench, sandbox)
    assert isinstance(attempt.outcome, Scored)
    assert (attempt.rounds, attempt.proxy.thought) == (2, "Two.")
    assert "was not accepted: error. line 2: ZeroDivisionError" in said(asked[1])


def test_a_duplicate_is_told_by_its_code_its_scores_and_its_bits(bench: Bench, sandbox: MontySandbox) -> None:
    judged = score(GOOD, [bench], sandbox)
    assert isinstance(judged, Scored)
    known = Known(dict.fromkeys(judged.prints, "p000"))
    same_code = GOOD.replace("    return", "    '''Says.'''\n    return  ")
    same_scores = "def sensitivity(layers, task):\n    return [3 / x['params'] for x in layers]\n"
    same_bits = "def sensitivity(layers, task):\n    return [1.001 / (x['params'] + 0.001) for x in layers]\n"
    script = [proposal("One.", code) for code in (same_code, same_scores, same_bits)]
    attempt, asked = propose(script, bench, sandbox, known)
    assert isinstance(attempt.outcome, Rejection)
    assert attempt.outcome.failure is Failure.DUPLICATE
    assert "the same code as p000" in said(asked[1])
    assert "the same scores as p000" in said(asked[2])
    assert "the same allocation of bits as p000" in attempt.outcome.message


def test_text_that_no_file_could_hold_is_made_to_fit(bench: Bench, sandbox: MontySandbox) -> None:
    attempt, _ = propose([proposal("Half a pair: \ud800.", f"# \udc00\n{GOOD}")], bench, sandbox)
    assert isinstance(attempt.outcome, Scored)
    assert attempt.proxy == Proxy("Half a pair: ?.", f"# ?\n{GOOD}")


def test_an_agent_that_only_talks_or_never_ends_is_given_up(bench: Bench, sandbox: MontySandbox) -> None:
    attempt, _ = propose([{"role": "assistant", "content": "Well."}] * 2, bench, sandbox, rounds=2)
    assert attempt.outcome == Rejection(Failure.UNPARSABLE, "the model submitted no proposal.")
    attempt, asked = propose([tool_call("run_code", code=GOOD)] * 9, bench, sandbox, rounds=1, model_calls=4)
    assert isinstance(attempt.outcome, Rejection)
    assert len(asked) == 4


def test_measuring_stops_at_the_allowance(bench: Bench, sandbox: MontySandbox) -> None:
    script = [tool_call("measure", code=GOOD), tool_call("measure", code=OTHER), proposal("Because.", GOOD)]
    _, asked = propose(script, bench, sandbox)
    assert "allowance of measurements is used up" in said(asked[2])


def test_the_calls_of_one_message_are_made_in_its_order_and_a_failure_takes_no_measurement(
    bench: Bench, sandbox: MontySandbox
) -> None:
    codes = ["def sensitivity(layers, task):\n    return [1 / 0 for x in layers]\n", GOOD, OTHER]
    several = tool_call("measure", code=codes[0])
    several["tool_calls"] = [
        {**call, "id": f"c{place}"}
        for place, code in enumerate(codes)
        for call in tool_call("measure", code=code)["tool_calls"]
    ]
    for _ in range(4):  # side by side they would not always come to this
        attempt, asked = propose([several, proposal("Because.", GOOD)], bench, sandbox)
        failed, measured, refused = (message["content"] for message in asked[1]["messages"][-3:])
        assert "ZeroDivisionError" in failed
        assert "0 measurements left" in measured
        assert "allowance of measurements is used up" in refused
        assert [draft.code for draft in attempt.drafts] == [GOOD]


def test_small_networks_may_be_measured_more_often(bench: Bench) -> None:
    assert allowance_for([bench]) == 3
    many = TEN_SECONDS / sum(layer.macs for layer in bench.layers) / bench.compared
    assert allowance_for([bench] * math.ceil(many)) == 1


def test_bad_arguments_and_unknown_tools_are_answered_not_raised(bench: Bench, sandbox: MontySandbox) -> None:
    script = [tool_call("run_code", wrong=1), tool_call("format_disk"), proposal("Because.", GOOD)]
    attempt, _ = propose(script, bench, sandbox)
    assert isinstance(attempt.outcome, Scored)


def test_the_embedded_model_draws_anew_in_each_round(bench: Bench, sandbox: MontySandbox) -> None:
    proposer = Proposer(LanguageModel("embedded"), [bench], sandbox)
    first = proposer.propose(Assignment("initialization", (), (), (), seed=5), Known({}))
    assert isinstance(first.outcome, Scored)
    again = proposer.propose(
        Assignment("initialization", (), (), (), seed=5), Known(dict.fromkeys(first.outcome.prints, "p000"))
    )
    assert again.rounds > 1
    assert again.proxy != first.proxy


def test_an_answer_of_the_embedded_model_that_is_cut_short_costs_a_round_and_no_run(
    bench: Bench, sandbox: MontySandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.embedded._TOKENS", 8)
    proposer = Proposer(LanguageModel("embedded"), [bench], sandbox, rounds=3)
    attempt = proposer.propose(Assignment("initialization", (), (), (), seed=7), Known({}))
    assert isinstance(attempt.outcome, Rejection)
    assert attempt.outcome.failure is Failure.UNPARSABLE
    assert attempt.outcome.message.startswith("the answer was cut off")
    assert attempt.rounds == len([each for each in attempt.conversation if each["role"] == "assistant"]) == 3


def test_the_embedded_model_is_offered_what_was_judged_to_be_promising(
    channel_bench: Bench, sandbox: MontySandbox
) -> None:
    """Powers of parameters that fall were good, others bad: so is what becomes of a bad one."""
    judged = {f"params**{power}": -power for power in (-2, -1.5, -0.5, 0.5, 1.5, 2)}
    _, code = grammar.code_of('{"thought": "T.", "expression": "params**1.5"}')
    parent = Parent("p000", Proxy("T.", code), -1.5, [0.9], [0.1], [300], [0.3], [[4.0] * 10])
    proposer = Proposer(LanguageModel("embedded"), [channel_bench], sandbox)
    attempt = proposer.propose(Assignment("mutation", (parent,), (), (), seed=5, judged=judged), Known({}))
    assert isinstance(attempt.outcome, Scored)
    sizes = [layer.params for layer in channel_bench.layers]
    assert rank_correlation(attempt.outcome.scores[0], sizes) < 0


def test_a_model_that_cannot_be_asked_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ModelMistake, match="gpt-x needs a key: set OPENAI_API_KEY"):
        LanguageModel("gpt-x").check()
    with pytest.raises(ModelMistake, match="does not answer"):
        LanguageModel("x", "http://127.0.0.1:9/v1").check()
    with ChatServer(lambda _: {}) as server:
        LanguageModel("x", server.url).check()
        server.refuses = True
        monkeypatch.setenv("OPENAI_API_KEY", "wrong-key")
        with pytest.raises(ModelMistake, match="refuses the key") as caught:
            LanguageModel("x", server.url).check()
        assert "wrong-key" not in str(caught.value)
