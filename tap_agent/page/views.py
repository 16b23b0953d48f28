"""What the page shows of one run: the values of its templates, nothing that a request does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage, convert_to_messages
from markdown_it import MarkdownIt

from graphs import population
from graphs.state import Candidate, by_proposal
from tap_agent.page.chat import Chat
from tap_agent.report import curves, figures, html, layer_figures
from tap_agent.report.figures import Section
from tap_agent.report.text import summary
from tap_agent.runs.folder import RunFolder
from tap_agent.runs.result import History, Result
from tap_agent.settings.model import Settings
from tap_agent.settings.read import dump

VIEWS = {
    "search": "Search",
    "proxies": "Proxies",
    "chat": "Chat",
    "family": "Family",
    "result": "Result",
    "log": "Log",
}
"""the views of a run, and what they are called"""
_MARKDOWN = MarkdownIt("js-default")  # no HTML of the author's gets through


def markdown(text: str) -> str:
    """As HTML that a page may hold: what tags the text has are shown, not obeyed."""
    return str(_MARKDOWN.render(text))


def drawing(figure: go.Figure) -> str:
    """A figure as JSON that a page may hold: no tag begins in it."""
    return str(figure.to_json()).replace("<", "\\u003c")


def show(
    kind: str,
    run: RunFolder,
    history: History,
    proxy: str | None,
    events: Sequence[dict[str, Any]],
    opened: Chat | None,
) -> dict[str, Any]:
    """What the view `kind` shows of a run; `opened` is the conversation about `proxy`, of a run that has ended."""
    match kind:
        case "search":
            return search(history)
        case "proxies":
            return proxies(history, proxy, events)
        case "chat":
            return chat(history, opened) if opened else {}
        case "family":
            return family(history, proxy)
        case "result":
            return outcome(history, run)
        case _:
            return {}


def search(history: History) -> dict[str, Any]:
    """The figures of the search, once a generation has been judged."""
    fitness, probabilities, deaths = figures.searching(history)
    sized = [curves.sizes(history, index) for index in history.shown]
    died = [deaths] if any(generation.failures for generation in history.generations) else []
    sections = [fitness, probabilities, *sized, *died] if history.generations else []
    return {"sections": sections, "notebook": history.notebook}


def progress(history: History, settings: Settings, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far a search is, in numbers and in words."""
    living = [candidate for candidate in history.candidates if not candidate.failure]
    best = history.candidate(history.best) if history.best else None
    return {
        "config": dump(settings),
        "of": settings.proposals,
        "made": sum(not each.draft_of for each in history.candidates),
        "alive": len(living),
        "generation": len(history.generations),
        "generations": settings.generations + 1,
        "best": best,
        "doing": next((text for text in map(doing, reversed(events)) if text), "opening the network and its images"),
        "summary": summary(history) if isinstance(history, Result) else "",
        "stopped": history.stopped if isinstance(history, Result) else None,
    }


def proxies(history: History, chosen: str | None, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The population, best first, and one candidate of it in full."""
    order = {candidate.name: place for place, candidate in enumerate(population.ranked(history.everyone))}
    rows = sorted(
        history.everyone,
        key=lambda each: (order.get(each.name, len(order) + bool(each.failure)), by_proposal(each.name)),
    )
    candidate = history.candidate(chosen) if chosen else None
    proposed = _proposed(candidate.name, events) if candidate else {}
    messages = [message for message in proposed.get("conversation", []) if "role" in message]  # not of earlier versions
    return {
        "rows": [(each, "" if each.fitness is None else _kib(history, each), fate(each)) for each in rows],
        "candidate": candidate,
        "fate": candidate and fate(candidate),
        "children": [each.name for each in history.everyone if chosen in each.parents],
        "tools": _tools(proposed.get("tool_calls", [])),
        "conversation": spoken(convert_to_messages(messages)),
        "sections": drawn(history, candidate) if candidate else [],
    }


def doing(event: dict[str, Any]) -> str:
    """What goes on after an event, in a few words, where the event says it."""
    match event["event"]:
        case "preparing":
            return f"measuring the layer errors of {event['network']}"
        case "proposed":
            died = f" died: {event['failure']}" if event["failure"] else ""
            return f"generation {event['generation']}: {event['template']} {event['name']}{died}"
        case "generation":
            return f"generation {event['index']} is judged"
        case "reflected":
            return f"generation {event['generation']} is in the notebook"
        case "measuring the table":
            return "measuring the table on the test split"
        case "measuring the curve":
            return "measuring accuracy against size on the test split"
        case _:
            return ""


def fate(candidate: Candidate) -> str:
    """What became of a candidate, in a word or two."""
    if candidate.failure:
        return candidate.failure
    if candidate.fitness is None:
        return "to be judged"
    return "dropped early" if candidate.dropped else ""


def drawn(history: History, candidate: Candidate) -> list[Section]:
    """Bits and scores of one candidate, a figure a network; none where it has no scores."""
    if not candidate.scores or not candidate.allocations:
        return []
    return [layer_figures.bits(history, candidate, index) for index in history.shown]


def family(history: History, chosen: str | None) -> dict[str, Any]:
    """The family tree."""
    if history.best is None:
        return {"sections": []}
    caption = (
        "Ancestors of the best proxy and of those from conversations; of the chosen one, descendants too. "
        "Click on one to see it."
    )
    return {"sections": [Section("family", "Family tree", caption, figures.family(history, chosen))]}


def outcome(history: History, run: RunFolder) -> dict[str, Any]:
    """The numbers, the table beside the baselines and the proxies to reuse, of a run that has ended."""
    if not isinstance(history, Result):
        return {"rows": []}
    best = history.candidate(history.best)
    return {**html.shown(history, f"{run.path}/"), "best": best, "sections": drawn(history, best)}


def chat(history: History, opened: Chat) -> dict[str, Any]:
    """A conversation, and what the version as it stands changes."""
    conversation = opened.conversation
    sections: list[Section] = []
    for index in history.shown:
        network = history.networks[index]
        versions = opened.drawn(history, index)
        if len(versions) == 1:
            sections.append(layer_figures.bits(history, history.candidate(versions[0].name), index))
        elif versions:
            sections.append(layer_figures.changes(network, versions[0], versions[1], index))
    busy = opened.busy
    questions = [] if busy else conversation.questions
    unanswered = not busy and conversation.unanswered
    messages, said = conversation.messages, opened.said() if busy or questions or unanswered else []
    while said and messages and not isinstance(messages[-1], HumanMessage):
        messages = messages[:-1]  # they are what is being said
    return {
        "messages": spoken(messages),
        "said": said,
        "busy": busy,
        "trouble": opened.trouble,
        "questions": questions,
        "unanswered": unanswered,
        "version": conversation.version,
        "before": conversation.before,
        "llm": opened.settings.llm,
        "base_url": opened.settings.base_url or "",
        "sections": sections,
        "living": population.ranked(history.everyone),
    }


def spoken(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages as the page shows them: who, the words as HTML, and the calls of tools with what they gave."""
    shown: list[dict[str, Any]] = []
    results = {message.tool_call_id: str(message.text) for message in messages if isinstance(message, ToolMessage)}
    for message in messages:
        if isinstance(message, HumanMessage):
            shown.append({"who": "you", "words": markdown(str(message.text)), "calls": []})
        elif isinstance(message, AIMessage):
            calls = [
                {"name": call["name"], "arguments": call["args"], "result": markdown(results.get(str(call["id"]), ""))}
                for call in message.tool_calls
            ]
            shown.append({"who": "agent", "words": markdown(str(message.text)), "calls": calls})
    return shown


def _kib(history: History, candidate: Candidate) -> str:
    """Size of the packed networks, where they are known."""
    sizes = [figures.kib(candidate, index, history.networks[index]) for index in history.shown]
    return ", ".join(f"{size:,.1f}" for size in sizes)


def _proposed(name: str, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The event that told of a candidate, if one did."""
    of_it = (event for event in reversed(events) if event["event"] == "proposed" and event["name"] == name)
    return next(of_it, {})


def _tools(calls: Sequence[str]) -> list[str]:
    """Tools that were called, with how often."""
    return [f"{name} × {count}" if count > 1 else name for name, count in Counter(calls).items()]
