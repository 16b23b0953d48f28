"""One session of a run: the graph over its checkpoints, from the start or from where it stopped."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.sqlite import SqliteSaver

from graphs.search import Search
from graphs.state import SearchState
from tap_agent import report
from tap_agent.folder import RunFolder
from tap_agent.result import Result, best_record, conclude, network_record
from tap_agent.workshop import Workshop
from tap_eval.mistake import Mistake

Listener = Callable[[dict[str, Any]], None]
_MOST_STEPS = 10_000  # far beyond any search; the graph's own default is 25


class NoProxyMistake(Mistake):
    """A search in which no candidate lived."""

    kind = "proxy"


def search(folder: RunFolder, workshop: Workshop, listen: Listener) -> Result:
    """Runs or continues the search of `folder` to its end; `listen` is given every event.

    Whatever is raised leaves the checkpoints as they are, and the next call continues there.
    """
    settings = workshop.settings
    finished: list[Result] = []

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "prepared":
            (bench,) = (each for each in workshop.benches if each.name == event["network"])
            event = {**event, "record": network_record(bench).model_dump(mode="json")}
        event = {**event, "measured": workshop.ledger.measured}
        folder.record(event)
        listen(event)

    def finish(state: SearchState) -> None:
        finished.append(conclude_run(folder, workshop, state, emit))

    graph = Search(workshop.proposer, workshop.search_settings(), emit, finish).graph()
    with SqliteSaver.from_conn_string(str(folder.checkpoints)) as checkpointer:
        compiled = graph.compile(checkpointer=checkpointer)
        known = next(checkpointer.list(None, limit=1), None)
        thread = known.config["configurable"]["thread_id"] if known else str(uuid.uuid4())
        config: RunnableConfig = {
            "configurable": {"thread_id": thread},
            "recursion_limit": _MOST_STEPS,
            "max_concurrency": settings.population,
        }
        emit({"event": "resumed" if known else "started", "thread": thread, "llm": settings.llm, "seed": settings.seed})
        start: Any = None if known else {"candidates": {}, "generations": []}
        compiled.invoke(start, config, durability="sync")
    result = finished[0] if finished else folder.result()
    assert result is not None
    return result


def conclude_run(folder: RunFolder, workshop: Workshop, state: SearchState, emit: Listener) -> Result:
    """Measures the final table and writes the result, the best allocation and the report."""
    if state["best"] is None:
        raise NoProxyMistake(
            f"none of {len(state['candidates'])} proposals lived; {folder.path / 'events.jsonl'} says why of each: "
            "give another --llm, more --generations or another --seed."
        )
    benches = workshop.benches
    emit({"event": "measuring the table", "networks": len(benches)})
    result = conclude(
        folder.name,
        workshop.settings.model_dump(mode="json"),
        state,
        benches,
        workshop.settings.seed,
        lambda: emit({"event": "table row"}),
    )
    emit({"event": "finished", "best": result.best})
    result = result.model_copy(update={"seconds": folder.seconds(), "measured": folder.measured()})
    best = result.candidate(result.best)
    provenance = {
        "run": folder.name,
        "proxy": best.name,
        "fitness": best.fitness,
        "generation": best.generation,
        "template": best.template,
        "parents": best.parents,
        "llm": workshop.settings.llm,
        "seed": workshop.settings.seed,
    }
    layers = [bench.layers for bench in benches]
    folder.save(result, best_record(best.thought, best.code, result.table, layers, provenance), report.render(result))
    return result
