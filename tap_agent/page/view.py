"""What the page shows of one run: the values of its templates, nothing that a request does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from markdown_it import MarkdownIt

from graphs import population
from graphs.state import Candidate
from tap_agent import figures, layers, report
from tap_agent.figures import Section
from tap_agent.folder import RunFolder
from tap_agent.page.talk import Talk
from tap_agent.result import Course, Result, summary
from tap_agent.settings import Settings, dump

VIEWS = {
    "search": "Search",
    "proxies": "Proxies",
    "talk": "Chat",
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
    course: Course,
    proxy: str | None,
    events: Sequence[dict[str, Any]],
    opened: Talk | None,
) -> dict[str, Any]:
    """What the view `kind` shows of a run; `opened` is the conversation about `proxy`, of a run that has ended."""
    match kind:
        case "search":
            return search(course)
        case "proxies":
            return proxies(course, proxy, events)
        case "talk":
            return talk(course, opened) if opened else {}
        case "family":
            return family(course, proxy)
        case "result":
            return outcome(course)
        case _:
            return {}


def search(course: Course) -> dict[str, Any]:
    """The figures of the search, once a generation has been judged."""
    fitness, probabilities, deaths = figures.searching(course)
    sized = [figures.sizes(course, index) for index in range(len(course.networks))]
    died = [deaths] if any(generation.failures for generation in course.generations) else []
    return {"sections": [fitness, probabilities, *sized, *died] if course.generations else []}


def progress(course: Course, settings: Settings, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far a search is, in numbers and in words."""
    living = [candidate for candidate in course.candidates if not candidate.failure]
    best = course.candidate(course.best) if course.best else None
    return {
        "config": dump(settings),
        "of": settings.population * (settings.generations + 1),
        "made": len(course.candidates),
        "alive": len(living),
        "generation": len(course.generations),
        "generations": settings.generations + 1,
        "best": best,
        "doing": next((text for text in map(doing, reversed(events)) if text), "opening the network and its images"),
        "summary": summary(course) if isinstance(course, Result) else "",
        "stopped": course.stopped if isinstance(course, Result) else None,
    }


def proxies(course: Course, chosen: str | None, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The population, best first, and one candidate of it in full."""
    order = {candidate.name: place for place, candidate in enumerate(population.ranked(course.everyone))}
    rows = sorted(course.everyone, key=lambda each: (order.get(each.name, len(order) + bool(each.failure)), each.name))
    candidate = course.candidate(chosen) if chosen else None
    proposed = _proposed(candidate.name, events) if candidate else {}
    return {
        "rows": [(each, "" if each.fitness is None else _kib(course, each), fate(each)) for each in rows],
        "candidate": candidate,
        "fate": candidate and fate(candidate),
        "children": [each.name for each in course.everyone if chosen in each.parents],
        "tools": _tools(proposed.get("tool_calls", [])),
        "conversation": spoken(messages(proposed.get("conversation", []))),
        "sections": drawn(course, candidate) if candidate else [],
    }


def messages(records: Sequence[dict[str, Any]]) -> list[BaseMessage]:
    """The conversation that led to a candidate, as its event has it."""
    made: dict[str, Callable[[dict[str, Any]], BaseMessage]] = {
        "human": lambda record: HumanMessage(record["text"]),
        "ai": lambda record: AIMessage(record["text"], tool_calls=record["calls"]),
        "tool": lambda record: ToolMessage(record["text"], tool_call_id=record["of"]),
    }
    return [made[record["who"]](record) for record in records]


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
        case "measuring the table":
            return "measuring the table on the test split"
        case _:
            return ""


def fate(candidate: Candidate) -> str:
    """What became of a candidate, in a word or two."""
    if candidate.failure:
        return candidate.failure
    if candidate.fitness is None:
        return "to be judged"
    return "dropped early" if candidate.dropped else ""


def drawn(course: Course, candidate: Candidate) -> list[Section]:
    """Bits and scores of one candidate, a figure a network; none where it has no scores."""
    if not candidate.scores or not candidate.allocations:
        return []
    return [layers.bits(course, candidate, index) for index in range(len(course.networks))]


def family(course: Course, chosen: str | None) -> dict[str, Any]:
    """The family tree."""
    if course.best is None:
        return {"sections": []}
    caption = (
        "Ancestors of the best proxy and of those from conversations; of the chosen one, descendants too. "
        "Click on one to see it."
    )
    return {"sections": [Section("family", "Family tree", caption, figures.family(course, chosen))]}


def outcome(course: Course) -> dict[str, Any]:
    """The numbers and the table beside the baselines, of a run that has ended."""
    if not isinstance(course, Result):
        return {"rows": []}
    best = course.candidate(course.best)
    return {**report.shown(course), "best": best, "sections": drawn(course, best)}


def talk(course: Course, opened: Talk) -> dict[str, Any]:
    """A conversation, and what the version as it stands changes."""
    conversation = opened.conversation
    sections: list[Section] = []
    for index, network in enumerate(course.networks):
        versions = opened.drawn(course, index)
        if len(versions) == 1:
            sections.append(layers.bits(course, course.candidate(versions[0].name), index))
        elif versions:
            sections.append(layers.changes(network, versions[0], versions[1], index))
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
        "living": population.ranked(course.everyone),
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


def _kib(course: Course, candidate: Candidate) -> str:
    """Size of the weights, where networks are known."""
    sizes = [
        figures.kib(candidate, index, [layer.params for layer in network.layers])
        for index, network in enumerate(course.networks)
    ]
    return ", ".join(f"{size:,.1f}" for size in sizes)


def _proposed(name: str, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The event that told of a candidate, if one did."""
    of_it = (event for event in reversed(events) if event["event"] == "proposed" and event["name"] == name)
    return next(of_it, {})


def _tools(calls: Sequence[str]) -> list[str]:
    """Tools that were called, with how often."""
    return [f"{name} × {count}" if count > 1 else name for name, count in Counter(calls).items()]
