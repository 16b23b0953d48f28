"""A tracked run read back through the libraries that it was written with; and that nothing is sent unasked."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from graphs.state import TEMPLATES
from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder
from tests.agents.scripted import Answer, ChatServer
from tests.graphs.test_search import script
from tests.tap_agent.program import tap

RUN = ["run", "--population", "3", "--generations", "1", "--search", "100", "--test", "100", "--draws", "1"]
History = dict[str, list[tuple[int, float]]]


@pytest.fixture
def work(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, where no environment says what to track."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAP_CACHE", str(cache))
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "LANGSMITH_", "LANGCHAIN_"))]:
        monkeypatch.delenv(name)
    return tmp_path


def from_mlflow(run: Path) -> History:
    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tap")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == run.name
    assert found.data.params["networks.0.network"] == "digits"
    assert found.data.params["population"] == "3"
    best = json.loads((run / "best.json").read_text())["provenance"]["proxy"]
    assert {file.path for file in client.list_artifacts(found.info.run_id)} >= {
        "best.json", "report.html", f"{best}.py",
    }  # fmt: skip
    fetched = Path(client.download_artifacts(found.info.run_id, "best.json"))
    assert fetched.read_text() == (run / "best.json").read_text()
    return {
        name: sorted((metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name))
        for name in found.data.metrics
    }


def from_tensorboard(run: Path) -> History:
    read = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    texts = {
        name: read.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for name in ("config", "best.json", "proxy")
    }
    assert "population: 3" in texts["config"]
    assert "def sensitivity(layers, task)" in texts["proxy"]
    assert json.loads(texts["best.json"]) == json.loads((run / "best.json").read_text())
    assert len([name for name in read.Tags()["tensors"] if name == "config/text_summary"]) == 1
    return {name: sorted((one.step, one.value) for one in read.Scalars(name)) for name in read.Tags()["scalars"]}


@pytest.mark.parametrize(("track", "read"), [("mlflow", from_mlflow), ("tensorboard", from_tensorboard)])
def test_a_tracked_run_that_broke_off_and_was_stopped_is_one_run_with_everything_once(
    work: Path, capsys: pytest.CaptureFixture[str], track: str, read: Callable[[Path], History]
) -> None:
    count = itertools.count()

    def breaking(request: dict[str, Any]) -> Answer:
        return script(request) if next(count) < 4 else {"role": "assistant", "tool_calls": "nonsense"}

    with ChatServer(breaking) as server:
        arguments = [*RUN, "--llm", "scripted", "--base-url", server.url, "--seed", "3", "--track", track]
        assert tap(*arguments, "--out", "runs/one") == Exit.MODEL
        server.script = script
        assert tap("resume", "runs/one", "--max-calls", "6") == Exit.LIMIT
        assert tap("resume", "runs/one", "--max-calls", "100") == Exit.OK
    run = work / "runs" / "one"
    history = read(run)
    result = RunFolder(run).result()
    assert result is not None
    generations = result.generations
    alive = [(number, each) for number, each in enumerate(result.candidates) if each.fitness is not None]
    expected: dict[str, list[tuple[int, float | None]]] = {
        "generation/best": [(each.index, each.best) for each in generations],
        "generation/mean": [(each.index, each.mean) for each in generations],
        "generation/failures": [(each.index, sum(each.failures.values()) / 3) for each in generations],
        **{
            f"probability/{template}": [(each.index, each.probabilities[template]) for each in generations]
            for template in TEMPLATES
        },
        "candidate/fitness": [(number, each.fitness) for number, each in alive],
        "candidate/accuracy": [(number, sum(each.top1) / 2) for number, each in alive],  # at two budgets
    }
    for name, values in expected.items():
        known = [(step, pytest.approx(value)) for step, value in values if value is not None]
        assert history[name] == known, name
    rows = {row.label if row.kind == "baseline" else row.kind: row for row in result.table}
    for name, value in (("test/proxy", rows["proxy"].test), ("search/random scores", rows["random scores"].search)):
        assert value is not None
        (stopped, _), ended = history[name]  # the table of the search that was stopped, and of the whole one
        assert stopped < 6
        assert ended == (6, pytest.approx(value.top1))
    proxy = rows["proxy"]
    assert (int(result.best[1:]), proxy.size_bytes) in history["candidate/bytes"]
    before = capsys.readouterr()
    assert tap("resume", "runs/one") == Exit.OK  # which has ended: its numbers are not sent twice
    assert read(run) == history
    assert "Traceback" not in before.err


@pytest.mark.parametrize("track", ["mlflow", "tensorboard"])
def test_a_missing_extra_is_named(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, track: str
) -> None:
    monkeypatch.setitem(sys.modules, track, None)
    assert tap(*RUN, "--track", track) == Exit.TRACKING
    said = capsys.readouterr().err
    assert said == f"error: --track {track} needs {track}: pip install -e '.[{track}]'.\n"
    assert list(work.iterdir()) == []


def test_a_server_that_does_not_answer_is_a_sentence_without_its_password(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    assert tap(*RUN, "--track", "mlflow") == Exit.TRACKING
    said = capsys.readouterr().err
    assert "the MLflow server of MLFLOW_TRACKING_URI does not answer" in said
    assert "secret" not in said
    assert list(work.iterdir()) == []


class Listening(ThreadingHTTPServer):
    """Counts what it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Counts)
        self.paths: list[str] = []


class _Counts(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST = do_PATCH = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def langsmith() -> Iterator[Listening]:
    """A server in the place of LangSmith's."""
    from langsmith.utils import get_env_var

    get_env_var.cache_clear()
    with Listening() as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()
    get_env_var.cache_clear()


def test_langsmith_is_sent_nothing_unless_its_variables_ask_for_it(
    work: Path, monkeypatch: pytest.MonkeyPatch, langsmith: Listening
) -> None:
    from langchain_core.tracers.langchain import wait_for_all_tracers

    monkeypatch.setenv("LANGSMITH_ENDPOINT", f"http://127.0.0.1:{langsmith.server_port}")
    monkeypatch.setenv("LANGSMITH_API_KEY", "key")  # a key alone asks for nothing
    small = ["run", "--population", "1", "--generations", "0", "--search", "50", "--test", "50", "--draws", "1"]
    with ChatServer(script) as server:
        arguments = [*small, "--llm", "scripted", "--base-url", server.url, "--seed", "3"]
        assert tap(*arguments, "--out", "quiet") == Exit.OK
        wait_for_all_tracers()
        assert langsmith.paths == []
        monkeypatch.setenv("LANGSMITH_TRACING", "true")
        from langsmith.utils import get_env_var

        get_env_var.cache_clear()
        assert tap(*arguments, "--out", "traced") == Exit.OK
        wait_for_all_tracers()
    assert any("/runs" in path for path in langsmith.paths)
