"""What a search leaves when it ends: its result, the best allocation, the report and the replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agents import replay
from agents.account import Account
from graphs.state import Candidate, Generation, SearchState, by_proposal
from graphs.winner import Finalist
from tap_agent.report import html
from tap_agent.runs.folder import NETWORKS, RunFolder
from tap_agent.runs.result import LayerRecord, ModelFile, NetworkRecord, Result
from tap_agent.sessions.curve import curve_entries
from tap_agent.sessions.export import file_names, model_file
from tap_agent.sessions.final_table import Advance, final_table, measured
from tap_agent.sessions.record import Chosen, allocated, chosen, record
from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import Settings
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import ExportMistake, Mistake


class NoProxyMistake(Mistake):
    """A search in which no candidate lived."""

    kind = "proxy"


def conclude_run(
    folder: RunFolder,
    resources: Resources,
    state: SearchState,
    emit: Callable[[dict[str, Any]], None],
    account: Account,
    stopped: str | None,
    brief: bool = False,
) -> Result:
    """Measures the final table and a curve, and writes the result, the best allocation, the report and the replay.

    In `brief` neither curve nor report nor files of networks, for one of many runs that are compared.
    """
    if state["best"] is None:
        raise NoProxyMistake(
            f"none of {len(state['candidates'])} proposals lived; {folder.path / 'events.jsonl'} says why of each. "
            "The search has ended: begin another by `tap-agent run` with another --llm, more --generations or another "
            "--seed."
        )
    benches, benchmark = resources.benches, resources.benchmark
    emit({"event": "measuring the table", "networks": len(benches)})
    result = conclude(
        folder.name,
        resources.settings.model_dump(mode="json"),
        state,
        benches,
        [network_record(bench, bench not in benches) for bench in benchmark],
        resources.settings,
        lambda: emit({"event": "table row"}),
    )
    for sentence in result.left_out:
        emit({"event": "left out", "why": sentence})
    entries = [] if brief else curve_entries(resources, result.candidate(result.best))
    emit({"event": "measuring the curve", "points": len(entries)})
    curve = []
    for entry in entries:
        curve.append(measured(entry, draws=1, search=False))
        emit({"event": "curve point"})
    emit({"event": "stopped" if stopped else "finished", "best": result.best, "why": stopped})
    networks = chosen(result.table, benches)
    files, unwritten = ([], []) if brief else _written(folder, networks)
    for sentence in unwritten:
        emit({"event": "not written", "why": sentence})
    before = folder.result()
    result = result.model_copy(
        update={
            "files": files,
            "unwritten": unwritten,
            "curve": curve,
            "seconds": folder.seconds(),
            "measured": folder.measured(),
            "spent": account.spent(),
            "stopped": stopped,
            "test_reads": sum(event["event"] == "measuring the table" for event in folder.events()),
            "refinements": before.refinements if before else folder.refinements(),
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
        "seed": resources.settings.seed,
    }
    records = [
        allocated(each, scales=False) | {"files": [x.model_dump() for x in files if x.network == each.row.network]}
        for each in networks
    ]
    written = record(best.thought, best.code, records, resources.settings, provenance)
    folder.save(result, written, None if brief else html.render(result), replay.written(account.answers()))
    return result


def _written(folder: RunFolder, networks: Sequence[Chosen]) -> tuple[list[ModelFile], list[str]]:
    """Writes the files of each network, and says why where there is none: a search is not to fail by that."""
    files, unwritten = [], []
    for suffix in NETWORKS:
        names = file_names("model", suffix, [each.row.network for each in networks])
        for name, each in zip(names, networks, strict=True):
            try:
                files.append(model_file(folder.path, name, each))
            except ExportMistake as mistake:
                unwritten.append(f"{name}: {mistake}")
    return files, unwritten


def conclude(
    run: str,
    config: dict[str, Any],
    state: SearchState,
    benches: Sequence[Bench],
    networks: list[NetworkRecord],
    settings: Settings,
    advance: Advance,
) -> Result:
    """The result of a search that found a living proxy; reads the test split.

    The first of the benchmark set are `benches`, of which there is a table; all of it is in `networks`.
    """
    candidates = [Candidate(**state["candidates"][name]) for name in sorted(state["candidates"], key=by_proposal)]
    assert state["best"] is not None
    best = Candidate(**state["candidates"][state["best"]])
    left_out: list[str] = []
    table = [
        row
        for bench, bits in zip(benches, best.allocations, strict=False)
        for row in final_table(bench, f"TAP ({best.name})", bits.allocation(), settings, advance, left_out.append)
    ]
    return Result(
        run=run,
        config=config,
        seconds=0.0,
        measured=0,
        networks=networks,
        generations=[Generation(**record) for record in state["generations"]],
        candidates=candidates,
        best=best.name,
        finalists=[Finalist(**record) for record in state.get("finalists", [])],
        notebook=state.get("notebook", []),
        table=table,
        left_out=left_out,
    )


def network_record(bench: Bench, searched_only: bool) -> NetworkRecord:
    """A network as the report shows it, or as candidates are measured on it beside that."""
    in_float: dict[str, int] = {}
    for rest in bench.prepared.rest:
        if rest.used:
            in_float[rest.reason] = in_float.get(rest.reason, 0) + 4 * rest.count
    return NetworkRecord(
        name=bench.name,
        searched_only=searched_only,
        images=bench.splits.name,
        budget=bench.task.budget.text,
        layers=[
            LayerRecord(name=x.name, kind=x.kind, params=x.params, macs=x.macs, out_channels=x.out_channels)
            for x in bench.layers
        ],
        layer_errors=bench.layer_errors,
        in_float=bench.prepared.share_left,
        in_float_bytes=in_float,
        sums=bench.sums.own,
        sums_of_inputs=bench.sums.inputs,
        unused_bytes=sum(4 * rest.count for rest in bench.prepared.rest if not rest.used),
    )
