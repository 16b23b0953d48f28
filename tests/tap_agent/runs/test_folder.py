"""A run's folder."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import empty_checkpoint

from agents.account import Account, Conversation
from agents.answer import Answer
from tap_agent.runs.checkpoints import fork, opened, query
from tap_agent.runs.folder import RunFolder, RunMistake, check_unused, usual_name
from tap_agent.settings.model import Settings
from tap_eval import sealed


def test_the_time_of_a_run_is_that_of_its_sessions(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Settings())
    days = {"started": "01T10:00:00", "finished": "01T10:00:10", "refined": "04T10:00:00", "resumed": "05T10:00:00",
            "stopped": "05T10:00:05", "forked": "09T10:00:00"}  # fmt: skip
    lines = [json.dumps({"event": event, "at": f"2026-01-{day}+00:00"}) for event, day in days.items()]
    (folder.path / "events.jsonl").write_text("\n".join(lines))
    assert folder.seconds() == 15


def test_no_clock_on_the_wall_makes_the_time_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Settings())
    days = {"started": 9, "judged": 2, "finished": 4}  # it was put back by a week, then on by two days
    lines = [{"event": event, "at": f"2026-01-{day:02d}T10:00:00+00:00"} for event, day in days.items()]
    (folder.path / "events.jsonl").write_text("\n".join(map(json.dumps, lines[:2])))
    assert folder.seconds() == 0
    told = [{**line, "elapsed": place} for place, line in enumerate(lines)]
    (folder.path / "events.jsonl").write_text("\n".join(map(json.dumps, told)))
    assert folder.seconds() == 2


def test_what_is_sealed_differs_from_everything_that_a_bit_makes_of_it() -> None:
    for text in ('{"a": 1}', '{\n "a": 1\n}', "a: 1\nb: 2\n"):
        whole = sealed.sealed(text)
        assert sealed.unsealed(whole) == text
        assert yaml.safe_load(whole).items() >= yaml.safe_load(text).items()
        for place, bit in itertools.product(range(len(whole)), range(7)):
            changed = f"{whole[:place]}{chr(ord(whole[place]) ^ 1 << bit)}{whole[place + 1 :]}"
            with pytest.raises(sealed.Damage):
                sealed.unsealed(changed)
        for end in range(1, len(whole)):
            with pytest.raises(sealed.Damage):
                sealed.unsealed(whole[:end])


def test_what_was_written_before_there_were_seals_is_taken_as_it_is_whatever_it_names() -> None:
    texts = ("of: before\n", "network: unsealed.nets:make\n", '{"run": "sealed-bits", "config": {}}',
             '{\n "run": "1 0123456789abcdef"\n}', "# what is sealed\na: 1\n")  # fmt: skip
    for text in texts:
        assert sealed.unsealed(text) == text


def test_a_run_of_before_there_was_the_setting_goes_on_keeping_all_its_steps(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Settings())
    assert folder.settings().keep_checkpoints == "last"
    values = yaml.safe_load(folder.config.read_text())
    del values["keep_checkpoints"]
    folder.config.write_text(yaml.safe_dump(values))
    assert folder.settings().keep_checkpoints == "all"
    assert folder.settings({"keep_checkpoints": "last"}).keep_checkpoints == "last"


def test_runs_of_before_a_setting_did_what_was_done_then(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Settings())
    values = yaml.safe_load(folder.config.read_text())
    before = {"attention_activations": "off", "finish": False, "channel_groups": 1}
    assert {name: values.pop(name) for name in before} == {
        "attention_activations": "8", "finish": True, "channel_groups": 4
    }  # fmt: skip
    folder.config.write_text(yaml.safe_dump(values))
    settings = folder.settings()
    assert {name: getattr(settings, name) for name in before} == before


def test_runs_that_begin_at_the_same_moment_have_folders_of_their_own(tmp_path: Path) -> None:
    settings = Settings()
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: RunFolder.unused(tmp_path / "run", settings).name, range(4)))
    assert sorted(made) == ["run", "run-2", "run-3", "run-4"]


def test_what_is_there_already_takes_no_run_and_a_name_of_a_collection_makes_one_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in ("empty", "link"):
        with pytest.raises(RunMistake, match=rf"{taken} exists already: give another --out\.$"):
            check_unused(tmp_path / taken)
    RunFolder.create(tmp_path / "run", Settings())
    with pytest.raises(RunMistake, match=r"exists already: give another --out, or continue it with `tap-agent resume"):
        check_unused(tmp_path / "run")
    for network in ("hf:microsoft/resnet-50", "timm:vit_tiny", "my.package:make"):
        assert Path(usual_name(network)).name == usual_name(network)


def test_a_fork_has_the_calls_for_the_notebook_that_it_has(tmp_path: Path) -> None:
    origin = RunFolder.create(tmp_path / "run", Settings())
    with Account(origin.calls) as account:
        for name in ("p000", "notebook 0", "notebook 1"):
            account.ask(Conversation(account, name, "x").call(name, 1, 1), lambda: Answer(content="Well."))
    for event in ({"event": "proposed", "name": "p000", "failure": "error"}, {"event": "reflected", "generation": 0}):
        origin.record(event)
    config: RunnableConfig = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    with opened(origin.checkpoints) as saver:
        made = saver.put(config, empty_checkpoint(), {}, {})["configurable"]["checkpoint_id"]
    with Account(fork(origin, made).calls) as account:
        assert [name for name, *_ in account.answers()] == ["notebook 0", "p000"]


def test_a_run_holds_its_last_step_alone_whatever_the_clock_says_unless_all_are_to_be_kept(tmp_path: Path) -> None:
    ids = ["1f0a0000-0000-6000-8000-000000000002", "1f0a0000-0000-6000-8000-000000000001"]
    for keep, kept in (("last", ids[1:]), ("all", sorted(ids))):
        path = tmp_path / f"{keep}.sqlite"
        with opened(path, keep) as saver:
            for each in ids:
                config: RunnableConfig = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
                at = saver.put(config, {**empty_checkpoint(), "id": each}, {}, {})
                saver.put_writes(at, [("channel", each)], "task")
        for table in ("checkpoints", "writes"):
            assert [row for (row,) in query(path, f"SELECT checkpoint_id FROM {table} ORDER BY 1")] == kept
