"""The page in a real browser: a run is started, stopped, resumed and watched, a proxy refined; and who may use it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from playwright.sync_api import Page, expect
from plotly.graph_objects import Figure
from starlette.testclient import TestClient

from tap_agent.exit import Exit
from tap_agent.page import views
from tap_agent.page.app import PASSWORD, application
from tap_agent.page.conversations import Conversations
from tap_agent.page.searches import Searches
from tap_agent.runs.folder import RunFolder
from tap_agent.runs.progress import of_events
from tap_agent.serving.address import listen
from tap_agent.settings.model import NetworkSettings, Settings
from tests.agents.scripted import Answer, ChatServer, tool_call
from tests.tap_agent.page.conftest import Site
from tests.tap_agent.program import tap
from tests.tap_agent.refining_agent import BY_STD, results, said, text


def agent(request: dict[str, Any]) -> Answer:
    """Proposes what is asked for, or measures it, and tells what came of it."""
    calls = {
        "Score": [tool_call("propose", thought="A layer that spreads more needs more bits.", code=BY_STD)],
        "Is": [tool_call("measure")],
    }
    done = results(request)
    todo = calls[said(request).split()[0]][len(done) :]
    return todo[0] if todo else text("Done. " + done[-1].splitlines()[0])


def test_a_run_is_started_stopped_resumed_and_watched_and_its_proxy_refined(
    look: Page, site: Site, keep: Callable[[Page, str], None]
) -> None:
    """One run from the form to the family tree, since each start of a search takes seconds."""
    state = look.locator("#head .pill")
    look.goto(site.url)
    expect(look.get_by_text("None in")).to_be_visible()
    look.get_by_text("More settings").click()
    for name, value in {"generations": "1", "population": "3", "search": "200", "test": "200", "draws": "1"}.items():
        look.locator(f"[name={name}]").fill(value)
    keep(look, "start")
    look.get_by_role("button", name="Start").click()
    expect(state).to_have_text("starting")
    keep(look, "starting")
    expect(look.get_by_text("the proposals so far")).to_be_visible()
    look.get_by_role("button", name="Stop").click()
    expect(state).to_have_text("interrupted")
    keep(look, "interrupted")
    look.get_by_role("button", name="Resume").click()
    expect(state).to_have_text("running")
    expect(look.locator("#figure-fitness svg").first).to_be_visible()
    keep(look, "running")
    expect(state).to_have_text("finished")
    keep(look, "search")
    (run,) = map(RunFolder, site.runs.iterdir())
    result = run.result()
    assert result
    assert [event["event"] for event in run.events()].count("resumed") == 1
    assert "generation index=1" in run.log.read_text()
    told = of_events(run.events())
    assert (told.networks, told.generations, told.best) == (result.networks, result.generations, result.best)
    later = {"prints", "bits", "seconds"}
    assert [each.model_dump(exclude=later) for each in told.candidates] == [
        each.model_dump(exclude=later) for each in result.candidates
    ]

    look.get_by_role("link", name="Result").click()
    expect(look.get_by_role("heading", name="Beside the baselines")).to_be_visible()
    keep(look, "result")
    look.get_by_role("link", name="Proxies").click()
    other = next(each for each in result.candidates if each.name != result.best and each.failure is None)
    look.locator("tr", has_text=other.name).click()
    expect(look.locator("#facts h2")).to_have_text(other.name)
    expect(look.locator("#facts > pre")).to_contain_text("def sensitivity")
    expect(look.locator("#figure-bits-0 svg").first).to_be_visible()
    look.get_by_text("How embedded came to it").click()
    expect(look.locator("#facts .said pre", has_text="def sensitivity")).to_be_visible()
    keep(look, "proxies")

    look.get_by_role("link", name="Refine it").click()
    with ChatServer(agent) as server:
        look.get_by_label("Model").fill("scripted")
        look.get_by_label("Base URL").fill(server.url)
        look.get_by_role("button", name="Use it").click()
        expect(look.get_by_text("Language model: scripted")).to_be_visible()
        message = look.get_by_label("Message")
        message.fill("Score layers by their spread.")
        message.press("Enter")
        expect(look.get_by_text("Done. digits")).to_be_visible()
        expect(look.locator("#version h2")).to_have_text("Not accepted yet")
        expect(look.locator("#figure-change-0 svg").first).to_be_visible()
        message.fill("Is it better?")
        message.press("Enter")
        expect(look.get_by_text("on 320 images?")).to_be_visible()
        keep(look, "question")
        look.get_by_label("measurements").fill("2")
        look.get_by_role("button", name="Allow").click()
        expect(look.get_by_text("Done. digits: accuracy")).to_be_visible()
        look.get_by_role("button", name="Accept").click()
        expect(look.get_by_text("Kept as c000")).to_be_visible()
        keep(look, "chat")
    look.get_by_label("Proxy").select_option(f"/runs/{run.name}/chat/{result.best}")
    expect(look.locator("#version h2")).to_have_text(result.best)
    expect(look.locator("form.say")).to_have_attribute("action", f"/runs/{run.name}/chat/{result.best}")
    look.get_by_role("link", name="Family").click()
    expect(look.locator("#figure-family text", has_text="c000")).to_be_visible()
    keep(look, "family")
    child = run.result().candidate("c000")  # type: ignore[union-attr]
    assert (child.parents, child.code) == ([other.name], BY_STD)

    limited = RunFolder(shutil.copytree(run.path, site.runs / "limited"))
    limited.extend(result.model_copy(update={"stopped": "--max-calls 6 is reached."}), "")
    look.get_by_role("link", name="limited").click()
    expect(state).to_have_text("stopped")
    look.get_by_label("Most calls").fill("0")
    keep(look, "limited")
    look.get_by_role("button", name="Resume").click()
    expect(look.locator("#head .trouble")).to_contain_text("Invalid value for '--max-calls'")
    keep(look, "refused")


@pytest.fixture
def client(tmp_path: Path, cache: Path) -> Iterator[TestClient]:
    """The page without a browser or a password, over a folder of one run that has not ended."""
    RunFolder.create(tmp_path / "runs" / "theirs", Settings())
    with Conversations(cache) as conversations:
        yield TestClient(
            application(Searches(tmp_path / "runs"), conversations, None), base_url="http://127.0.0.1:7860"
        )


HOLD = """
import signal, sys, filelock
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
try:
    sys.stdin.read()
except KeyboardInterrupt:
    sys.exit(130)
"""


@contextmanager
def held(run: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that writes a run, until it is interrupted."""
    command = [sys.executable, "-c", HOLD, str(run / ".lock"), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_search_of_another_process_is_stopped_and_nothing_else_is(client: TestClient, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "theirs"
    assert "interrupted" in client.get("/").text
    with held(run) as stranger:
        assert "running" in client.get("/runs/theirs").text
        refused = client.post("/runs/theirs/stop")
        assert refused.status_code == 409
        assert "by a process that this page did not start: stop it there" in refused.text
        assert "being written by another process" in client.post("/runs/theirs/resume").text
        assert stranger.poll() is None
    with held(run, "tap-agent", "run") as search:
        assert client.post("/runs/theirs/stop").status_code == 204
        assert search.wait() == 130
    assert client.post("/runs/theirs/stop").text == "theirs is not running."
    assert client.get("/runs/..%2Ftheirs").status_code == 404


def test_a_mistake_in_the_form_is_its_sentence_and_the_form_keeps_what_was_given(
    client: TestClient, tmp_path: Path
) -> None:
    before = sorted(path.name for path in (tmp_path / "runs").iterdir())
    place = client.post("/runs", data={"network": "resnet81", "seed": "7"}).headers["location"]
    while "Change the settings" not in (page := client.get(place).text):
        assert "starting" in page
        time.sleep(0.2)
    assert "&#39;resnet81&#39; is an unknown network" in page
    name = place.removeprefix("/runs/")
    form = client.get(f"/?from={name}").text
    assert 'name="network" value="resnet81"' in form
    assert 'name="seed" value="7"' in form
    ends = time.monotonic() + 10
    while sorted(path.name for path in (tmp_path / "runs").iterdir()) != before:  # its log is taken away
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_other_sites_and_names_are_refused_and_what_a_model_says_is_not_markup(client: TestClient) -> None:
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 421
    assert client.post("/runs", headers={"Origin": "http://evil.example"}).status_code == 403
    assert "default-src 'none'" in client.get("/").headers["content-security-policy"]
    assert "<script" not in views.markdown("a <script>alert(1)</script> [b](javascript:alert(1))")
    assert "</script" not in views.drawing(Figure(layout={"title": {"text": "</script>"}}))


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        ([], False),
        ([{"who": "ai", "text": "of an earlier version", "calls": []}], False),
        (
            [
                {"role": "user", "content": "Propose."},
                {"role": "assistant", "content": "", "tool_calls": [
                    {"type": "function", "id": "c1", "function": {"name": "run_code", "arguments": '{"code": "1 / 0"}'}}
                ]},
                {"role": "tool", "tool_call_id": "c1", "content": "error: ZeroDivisionError"},
            ],
            True,
        ),
    ],
)  # fmt: skip
def test_how_a_candidate_came_about_is_shown_where_it_is_known(
    client: TestClient, tmp_path: Path, messages: list[Any], shown: bool
) -> None:
    about = {"name": "p000", "generation": 0, "template": "initialization", "parents": [], "thought": "", "code": ""}
    event = {"event": "proposed", **about, "failure": "duplicate", "conversation": messages}
    RunFolder(tmp_path / "runs" / "theirs").record(event)
    page = client.get("/runs/theirs/proxies/p000").text
    assert all((text in page) == shown for text in ("Propose.", "code: 1 / 0", "error: ZeroDivisionError"))


def test_one_folder_that_cannot_be_read_leaves_the_others(
    client: TestClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "runs" / "theirs"
    for name, bad in {"events": b'5\n{}\n"x"\n\xff\n', "result": b"\xff", "nested": b"[" * 100_000}.items():
        shutil.copytree(theirs, theirs.with_name(name))
        (theirs.with_name(name) / ("events.jsonl" if name == "events" else "result.json")).write_bytes(bad)
    page = client.get("/").text
    for name in ("theirs", "events", "result", "nested"):
        assert f"/runs/{name}" in page
        assert client.get(f"/runs/{name}").status_code == 200
    RunFolder.create(theirs.with_name("marked"), Settings(networks=(NetworkSettings(network="[/x]\x1b]0;owned\x07"),)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        assert tap("list", str(theirs.parent)) == Exit.OK
    listed = capsys.readouterr().out
    assert "[/x]]0;owned" in listed
    assert "\x1b]0" not in listed


@pytest.mark.parametrize(("body", "status"), [(b"network=%FF", 400), (b"seed=1%00", 400), (b"a" * 2**21, 413)])
def test_a_form_that_no_person_fills_in_starts_nothing(client: TestClient, body: bytes, status: int) -> None:
    assert client.post("/runs", content=body).status_code == status


def test_a_form_that_is_cut_off_starts_nothing_and_is_no_error(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    head = b"POST /runs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nnetwork=digits"
    with Conversations(cache) as conversations, listen("127.0.0.1", 0) as listening:
        page = application(Searches(tmp_path / "runs"), conversations, None)
        server = uvicorn.Server(uvicorn.Config(page, log_level="warning"))
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        serving.start()
        port = listening.getsockname()[1]
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", port)) as cut:
                cut.sendall(head)
        assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).status_code == 200
        server.should_exit = True
        serving.join()
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "runs").exists()


def test_wrong_passwords_are_tried_one_after_another(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tap_agent.page.guard._WRONG_PASSWORD_SECONDS", 0.2)
    with (
        Conversations(cache) as conversations,
        TestClient(application(Searches(tmp_path), conversations, "right")) as client,
        ThreadPoolExecutor() as pool,
    ):
        began = time.monotonic()
        tried = list(pool.map(lambda word: client.get("/", auth=("me", word)).status_code, ["a", "b", "c"]))
        assert tried == [401, 401, 401]
        assert time.monotonic() - began > 0.59


def test_a_page_with_a_password_opens_to_nobody_without_it(tmp_path: Path, cache: Path) -> None:
    with Conversations(cache) as conversations:
        client = TestClient(application(Searches(tmp_path), conversations, "pässword"), base_url="http://some.example")
        assert client.get("/").status_code == 401
        assert client.get("/static/page.js", auth=("me", "wrong")).status_code == 401
        assert client.get("/", headers={"Authorization": b"Basic \xe4"}).status_code == 401
        assert "Start a run" in client.get("/", auth=("anyone", "pässword")).text


def test_an_address_that_cannot_be_listened_on_and_a_missing_password_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert tap("ui", str(tmp_path), "--port", str(port), "--no-browser") == Exit.PORT
        assert f"127.0.0.1:{port} cannot be listened on (Address already in use)" in capsys.readouterr().err
    assert tap("ui", str(tmp_path), "--host", "no.such.host.invalid", "--no-browser") == Exit.CONFIG
    assert tap("ui", str(tmp_path), "--host", "0.0.0.0", "--no-browser") == Exit.CONFIG
    assert "TAP_UI_PASSWORD is not set" in capsys.readouterr().err


def test_a_page_shows_more_conversations_at_once_than_it_keeps_open(run: RunFolder, cache: Path) -> None:
    result = run.result()
    assert result
    with Conversations(cache) as conversations, ThreadPoolExecutor(6) as pool:
        client = TestClient(
            application(Searches(run.path.parent), conversations, None), base_url="http://127.0.0.1:7860"
        )
        names = [each.name for each in result.candidates if each.failure is None][:4]
        addresses = [f"/runs/{run.name}/chat/{name}" for name in names] * 6
        assert {answer.status_code for answer in pool.map(client.get, addresses)} == {200}
