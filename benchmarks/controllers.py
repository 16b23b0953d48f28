"""The controllers ablated: what learning the probabilities of templates adds to a search, over many seeds.

    tap-agent benchmark build --config configs/resnet20-cifar10.yaml --out data/resnet20-cifar10-measured.parquet
    PYTHONPATH=. python benchmarks/controllers.py configs/resnet20-cifar10.yaml \
        --given data/resnet20-cifar10-measured.parquet --seeds 50 --llm random --out controllers.jsonl

Whole searches of the config under each controller, judged by measured allocations (`--worth benchmark:FILE`), so that a
candidate costs no measurement. The seeds are of the search alone: network, calibration images and file are the same for
all, and so is the first generation of a seed. `--llm random` takes any sentence of the embedded model's grammars, each
alternative as likely as the others, in place of what that model says; everything else is as in a search with it. What
is in the file is not done again, and one of other settings is refused.

Of each controller, means over seeds with one standard deviation: the best fitness; of proposals with parents, the gain
over the better one, and the share that gained; the standard deviation of fitness within a generation; proposals until
the mean best fitness of `uniform` is reached, where never all of them count. In brackets by how many per cent of
`uniform` it is above that, and p of a paired test over seeds (Wilcoxon, two-sided).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langgraph.checkpoint.memory import InMemorySaver
from scipy.stats import wilcoxon

from agents.account import Conversation
from agents.answer import SUBMIT
from agents.proposer import Proposer
from graphs.controller import UPDATES
from graphs.search import Search, SearchSettings
from graphs.state import Candidate, by_proposal
from prompts.grammar import code_of
from tap_agent.paths import cache_folder
from tap_agent.sessions.record import versions
from tap_agent.sessions.resources import Resources
from tap_agent.settings.read import read_settings
from tap_agent.tables.course import Proposal, best, course, gain, gained, proposals, until, within
from tap_eval.measuring.ledger import key
from tap_eval.proxies import features
from tap_eval.sealed import digest

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\](?:\{\d+,\d+\})?|[a-z]+|[()|?]')
Row = dict[str, Any]


def main() -> None:
    """Runs what is missing and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--given", type=Path, required=True, help="file of measured allocations")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--llm", choices=("embedded", "random"), default="random")
    parser.add_argument("--controllers", default=",".join(UPDATES))
    parser.add_argument("--generations", type=int)
    parser.add_argument("--out", type=Path, default=Path("controllers.jsonl"))
    chosen = parser.parse_args()
    flags = {"worth": f"benchmark:{chosen.given}", "generations": chosen.generations, "llm": "embedded"}
    names = chosen.controllers.split(",")
    if "uniform" not in names:
        raise SystemExit("--controllers leaves out uniform, which the others are compared with: name it too.")
    rows: list[Row] = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    settings = read_settings(chosen.config, flags)
    about = key(settings.model_dump(mode="json"), digest(chosen.given.read_bytes()), versions(), features.VERSION)
    if any(row.get("about") != about for row in rows):
        raise SystemExit(f"{chosen.out} holds rows of other settings, another file or version: name another --out.")
    with (
        tempfile.TemporaryDirectory() as folder,
        Resources(settings, cache_folder()) as resources,
        resources.account(Path(folder) / "calls.sqlite") as account,
    ):
        proposer = resources.proposer(account)
        if chosen.llm == "random":
            proposer = replace(proposer, models=Drawing())
        for seed in range(chosen.seeds):
            for name in names:
                what = {"llm": chosen.llm, "controller": name, "seed": seed}
                if any(what.items() <= row.items() for row in rows):
                    continue
                its = replace(resources.search_settings(), controller=name, seed=seed)
                rows.append({**what, "about": about, "proposals": searched(proposer, its)})
                with chosen.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    tell([row for row in rows if row["llm"] == chosen.llm and row["seed"] < chosen.seeds], names)


def searched(proposer: Proposer, settings: SearchSettings) -> list[Row]:
    """The proposals of a search in their order, which ends before its best are measured."""
    search = Search(lambda: proposer, settings, lambda _: None, lambda _: None, lambda _: [])
    graph = search.graph().compile(checkpointer=InMemorySaver(), interrupt_before=["choose"])
    steps = {"recursion_limit": 10_000, "max_concurrency": 1, "configurable": {"thread_id": "search"}}
    records = graph.invoke({}, steps)["candidates"]  # type: ignore[arg-type]
    found = [Candidate(**records[name]) for name in sorted(records, key=by_proposal)]
    pairs = zip(proposals(found), course(found), strict=True)
    return [{"template": each.template, **its._asdict()} for each, its in pairs]


@dataclass(frozen=True)
class Drawing:
    """In place of a small language model: sentences of its grammars, drawn at random."""

    spec: str = "random"
    small: bool = True
    reflects: bool = False
    members: tuple[()] = ()

    def draw(self, name: str, seed: int) -> Drawing:
        """Itself."""
        return self

    def check(self) -> None:
        """Nothing has to be there."""

    def chat(self, conversation: Conversation, seed: int, grammar: str | None) -> BaseChatModel:
        """A chat model that submits a sentence of `grammar`."""
        return DrawingChat(grammar=grammar or "", seed=seed)


class DrawingChat(BaseChatModel):
    """Submits a sentence of a grammar, whatever it is asked."""

    grammar: str
    seed: int

    @property
    def _llm_type(self) -> str:
        return "random"

    def bind_tools(self, tools: Any, **options: Any) -> Runnable[Any, Any]:
        """Itself: it has no use for other tools."""
        return self

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> ChatResult:
        thought, code = code_of(sentence(self.grammar, random.Random(self.seed)))
        call = {"name": SUBMIT, "args": {"thought": thought, "code": code}, "id": "proposal"}
        return ChatResult(generations=[ChatGeneration(message=AIMessage("", tool_calls=[call]))])


def sentence(grammar: str, rng: random.Random) -> str:
    """A sentence of a GBNF grammar as `prompts.grammar` writes them, each alternative as likely as the others."""
    rules = {name: _TOKEN.findall(rule) for name, _, rule in (line.partition(" ::= ") for line in grammar.splitlines())}

    def alternatives(tokens: list[str]) -> str:
        """Any one up to the end of the rule or of the brackets; takes its tokens away."""
        found = [sequence(tokens)]
        while tokens and tokens[0] == "|":
            tokens.pop(0)
            found.append(sequence(tokens))
        return rng.choice(found)

    def sequence(tokens: list[str]) -> str:
        said: list[str] = []
        while tokens and tokens[0] not in "|)":
            part = tokens.pop(0)
            if part == "(":
                said.append(alternatives(tokens))
                tokens.pop(0)
            elif part == "?":
                said[-1] = rng.choice(("", said[-1]))
            elif part.startswith("["):
                said.append(_letters(part, rng))
            else:
                said.append(json.loads(part) if part.startswith('"') else alternatives([*rules[part]]))
        return "".join(said)

    return alternatives([*rules["root"]])


def _letters(token: str, rng: random.Random) -> str:
    """As many of a class of characters, as `[a-z ,]{15,100}`, as it may have."""
    inside, _, times = token[1:].partition("]")
    least, most = map(int, times.strip("{}").split(",")) if times else (1, 1)
    ranges = re.sub(r"(.)-(.)", lambda each: "".join(map(chr, range(ord(each[1]), ord(each[2]) + 1))), inside)
    return "".join(rng.choices(ranges, k=rng.randint(least, most)))


def tell(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Prints the table."""
    of = {
        (row["controller"], row["seed"]): [Proposal(*map(each.get, Proposal._fields)) for each in row["proposals"]]
        for row in rows
    }
    seeds = sorted({seed for _, seed in of})
    goal = statistics.mean(best(its) for (name, _), its in of.items() if name == "uniform")
    rates: dict[str, Callable[[Sequence[Proposal]], float | None]] = {
        "best fitness": best,
        "gain over the better parent": gain,
        "share that gained": gained,
        "spread in a generation": within,
        "proposals until it": lambda its: until(its, goal, len(its)),
    }
    print(f"{len(seeds)} seeds; uniform comes to {goal:.4f} in the mean\n")
    print(f"| controller | {' | '.join(rates)} | seeds that reach it |\n{'|---' * (len(rates) + 2)}|")
    for name in names:
        cells = []
        for rate in rates.values():
            its, uniform = ([rate(of[each, seed]) for seed in seeds] for each in (name, "uniform"))
            cells.append(_cell(its, None if name == "uniform" else uniform))
        reached = sum(best(of[name, seed]) >= goal for seed in seeds)
        print(f"| {name} | {' | '.join(cells)} | {reached} |")


def _cell(its: Sequence[float], uniform: Sequence[float] | None) -> str:
    """Mean and deviation; beside `uniform`, by how many per cent the mean is above it, and the p of a paired test."""
    mean, several = statistics.mean(its), len(its) > 1
    spread = f" ± {statistics.stdev(its):.3g}" if several else ""
    if uniform is None:
        return f"{mean:.4g}{spread}"
    differences = [one - other for one, other in zip(its, uniform, strict=True)]
    test = f", p {_p(wilcoxon(differences).pvalue)}" if any(differences) and several else ""
    return f"{mean:.4g}{spread} ({statistics.mean(differences) / abs(statistics.mean(uniform)):+.1%}{test})"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


if __name__ == "__main__":
    main()
