"""Steps of a search hold each candidate once, and are what was written, or damaged."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.types import Send

from tap_agent.runs.checkpoints import Checkpoints, Keep, check, opened, query
from tap_eval.mistake import DamagedMistake

PARTS = "SELECT count(*) FROM parts WHERE name LIKE ?"
CONFIG: RunnableConfig = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}


def candidate(name: str, **judged: Any) -> dict[str, Any]:
    return {"name": name, "code": f"# {name}\n" * 100, "fitness": None, **judged}


def step(records: dict[str, Any], *sent: Send) -> Any:
    return {**empty_checkpoint(), "channel_values": {"generation": 3, "candidates": records, "tasks": [*sent]}}


def jobs(known: dict[str, str]) -> list[Send]:
    shared = {"known": known, "judged": {"params": 0.5}, "library": [{"name": "p000"}]}
    return [Send("mutation", {"name": f"p{place:03d}", **shared}) for place in range(8)]


def values(saver: Checkpoints) -> Any:
    found = saver.get_tuple(CONFIG)
    assert found
    return found.checkpoint["channel_values"]


def size(path: Path) -> int:
    return int(query(path, "SELECT sum(length(checkpoint)) FROM checkpoints")[0][0])


@pytest.mark.parametrize("keep", get_args(Keep))
def test_steps_are_read_as_they_were_written_and_share_their_candidates(tmp_path: Path, keep: Keep) -> None:
    path = tmp_path / "steps.sqlite"
    records = {f"p{place:03d}": candidate(f"p{place:03d}") for place in range(100)}
    judged = {**records, "p099": candidate("p099", fitness=0.5)}
    sent = jobs({record["code"]: name for name, record in records.items()})
    with opened(path, keep) as saver:
        for taken in (step(records), step(records, *sent), step(judged)):
            saver.put_writes(saver.put(CONFIG, taken, {}, {}), [("tasks", each) for each in sent], "task")
            found = saver.get_tuple(CONFIG)
            assert found
            assert found.checkpoint["channel_values"] == taken["channel_values"]
            assert [value for _, _, value in found.pending_writes or []] == sent
        assert size(path) < (3000 if keep == "last" else 9000)  # a hundred candidates, whole, take more
        ((first,),), ((last,),) = (query(path, PARTS, name) for name in ("p000", "p099"))
        assert (first, last) == ((1, 1) if keep == "last" else (1, 2))
    with opened(path, keep) as saver:  # as a run that goes on: what is written again is there once
        assert values(saver) == taken["channel_values"]
        saver.put(CONFIG, step(dict(values(saver)["candidates"]), *sent), {}, {})
        assert values(saver)["candidates"] == judged
        assert query(path, PARTS, "p%") == [(100 if keep == "last" else 101,)]


def test_a_step_of_before_there_were_parts_is_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "steps.sqlite"
    whole = step({"p000": candidate("p000")}, *jobs({"a": "p000"}))
    with opened(path) as saver:
        row = (whole["id"], *JsonPlusSerializer().dumps_typed(whole))
        saver.conn.execute("INSERT INTO checkpoints VALUES ('t', '', ?, NULL, ?, ?, '{}')", row)
        assert values(saver) == whole["channel_values"]
        saver.put(CONFIG, step({**values(saver)["candidates"], "p001": candidate("p001")}), {}, {})
        assert list(values(saver)["candidates"]) == ["p000", "p001"]


@pytest.mark.parametrize("change", ["UPDATE parts SET content = zeroblob(9)", "UPDATE parts SET name = 'p001'",
                                    "DELETE FROM parts"])  # fmt: skip
def test_a_step_whose_candidates_are_not_what_was_written_is_damaged(tmp_path: Path, change: str) -> None:
    path = tmp_path / "steps.sqlite"
    with opened(path) as saver:
        saver.put(CONFIG, step({"p000": candidate("p000")}), {}, {})
    check(path, "begin anew")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(change)
    with pytest.raises(DamagedMistake, match=r"of a step.*: begin anew"):
        check(path, "begin anew")
