"""One session of a run: the graph over its checkpoints, from the start or from where it stopped."""

from __future__ import annotations

import uuid
from collections import ChainMap
from collections.abc import Callable
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver

from agents import replay
from agents.account import Account, LimitMistake
from graphs.search import Search
from graphs.state import SearchState
from tap_agent import report
from tap_agent.folder import RunFolder
from tap_agent.result import Result, best_record, conclude
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

    A limit of calls, cost or time ends the search early, with a result all the same: what was
    paid for is worth knowing, so the proposals of the unfinished generation are judged too, and
    the best so far gets its table and report, which say that they were `stopped`. The
    checkpoints stay at the unfinished generation, from where a later call with a higher limit
    goes on. Only where nothing lives yet is `LimitMistake` raised.
    """
    settings = workshop.settings
    finished: list[Result] = []

    def emit(event: dict[str, Any]) -> None:
        event = {**event, "measured": workshop.ledger.measured}
        folder.record(event)
        listen(event)

    with (
        workshop.account(folder.calls, folder.seconds()) as account,
        SqliteSaver.from_conn_string(str(folder.checkpoints)) as checkpointer,
    ):

        def finish(state: SearchState) -> None:
            finished.append(conclude_run(folder, workshop, state, emit, account))

        machine = Search(lambda: workshop.proposer(account), workshop.search_settings(), emit, finish)
        checkpointer.serde = JsonPlusSerializer(allowed_msgpack_modules=[("agents.proposer", "Proposal")])
        compiled = machine.graph().compile(checkpointer=checkpointer)
        known = next(checkpointer.list(None, limit=1), None)
        thread = known.config["configurable"]["thread_id"] if known else str(uuid.uuid4())
        config: RunnableConfig = {
            "configurable": {"thread_id": thread},
            "recursion_limit": _MOST_STEPS,
            "max_concurrency": settings.population,
        }
        emit({"event": "resumed" if known else "started", "thread": thread, "llm": settings.llm, "seed": settings.seed})
        start: Any = None if known else {"candidates": {}, "generations": []}
        try:
            compiled.invoke(start, config, durability="sync")
        except LimitMistake as limit:
            snapshot = compiled.get_state(config)
            results = [task.result["candidates"] for task in snapshot.tasks if task.result]
            state = machine.so_far(cast("SearchState", snapshot.values), dict(ChainMap(*results)))
            if state["best"] is None:
                raise
            finished.append(conclude_run(folder, workshop, state, emit, account, stopped=str(limit)))
    result = finished[0] if finished else folder.result()
    assert result is not None
    return result


def conclude_run(
    folder: RunFolder,
    workshop: Workshop,
    state: SearchState,
    emit: Listener,
    account: Account,
    stopped: str | None = None,
) -> Result:
    """Measures the final table and writes the result, the best allocation, the report and the replay."""
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
    emit({"event": "stopped" if stopped else "finished", "best": result.best, "why": stopped})
    before = folder.result()
    result = result.model_copy(
        update={
            "seconds": folder.seconds(),
            "measured": folder.measured(),
            "spent": account.spent(),
            "stopped": stopped,
            "refinements": before.refinements if before else [],
        }
    )
    best = result.candidate(result.best)
    provenance = {
        "run": folder.name,
        "proxy": best.name,
        "fitness": best.fitness,
        "generation": best.generation,
        "template": best.template,
        "parents": best.parents,
        "llm": best.llm,
        "seed": workshop.settings.seed,
    }
    layers = [bench.layers for bench in benches]
    record = best_record(best.thought, best.code, result.table, layers, provenance)
    folder.save(result, record, report.render(result), replay.written(account.answers()))
    return result
