"""The page in a real browser: a run is started, stopped, resumed and watched, a proxy refined; and who may use it.

Screenshots are kept in the folder that `TAP_SCREENSHOTS` names.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright
from plotly.graph_objects import Figure
from starlette.testclient import TestClient

from tap_agent.exit import Exit
from tap_agent.page import views
from tap_agent.page.app import PASSWORD, application
from tap_agent.page.conversations import Conversations
from tap_agent.page.searches import Searches
from tap_agent.runs.folder import RunFolder
from tap_agent.runs.progress import of_events
from tap_agent.settings.model import Settings
from tests.agents.scripted import Answer, ChatServer, tool_call
from tests.tap_agent.program import tap
from tests.tap_agent.refining_agent import BY_STD, results, said, text

PATIENCE = 60_000
"""ms, for a loaded machine: nothing waits longer than it must"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        installed = filter(None, map(shutil.which, ("chromium", "google-chrome")))
        for place in (*installed, None):  # None is Playwright's own
            try:
                opened = playwright.chromium.launch(executable_path=place)
            except Error as error:
                reason = str(error).strip().splitlines()[0]
                continue
            yield opened
            opened.close()
            return
        pytest.skip(f"no Chromium to drive the page in ({reason}): run `playwright install --with-deps chromium`")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site"), cache) as opened:
        yield opened


class Site:
    """`tap-agent ui` in a process of its own, over an empty folder of runs."""

    def __init__(self, folder: Path, cache: Path, *arguments: str, **environment: str) -> None:
        self.runs = folder / "runs"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tap_agent", "ui", str(self.runs), "--port", "0", "--no-browser", *arguments],
            env={**os.environ, "TAP_CACHE": str(cache), **environment}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout
        found = re.match(r"(http://\S+:(\d+)) shows the runs", self.process.stdout.readline())
        assert found
        self.url, self.port = found[1], int(found[2])

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def look(browser: Browser, site: Site) -> Iterator[Page]:
    """A tab in which nothing may fail and nothing may come from elsewhere."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    wrong: list[str] = []
    page.on("request", lambda each: each.url.startswith((site.url, "data:", "blob:")) or wrong.append(each.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    yield page
    page.close()
    assert wrong == []


@pytest.fixture
def keep(tmp_path: Path) -> Callable[[Page, str], None]:
    """Looks at a page on a desk and on a telephone, where nothing may stand out to the side, and keeps what is seen."""
    folder = Path(os.environ.get("TAP_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def screenshots(page: Page, name: str) -> None:
        for width in (400, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(150)  # Plotly draws again
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=folder / f"{name}-{width}.png", full_page=True)

    return screenshots


def agent(request: dict[str, Any]) -> Answer:
    """Proposes what is asked for, or measures it, and tells what came of it."""
    calls = {
        "Score": [tool_call("propose", thought="A layer that spreads more needs more bits.", code=BY_STD)],
        "Is": [tool_call("measure")],
    }
    done = results(request)
    todo = calls[said(request).split()[0]][len(done) :]
    return todo[0] if todo else text("Done. " + done[-1].splitlines()[0])


def downloaded(page: Page, name: str) -> bytes:
    """What a click on the file called `name` brings."""
    with page.expect_download() as download:
        page.get_by_role("link", name=name).click()
    assert download.value.suggested_filename == name
    return Path(download.value.path()).read_bytes()


def test_the_files_of_a_run_are_saved_from_its_result_and_from_its_report(
    look: Page, site: Site, run: RunFolder, keep: Callable[[Page, str], None]
) -> None:
    kept = RunFolder(shutil.copytree(run.path, site.runs / "kept"))
    look.goto(f"{site.url}/runs/kept/result")
    for name in ("model.safetensors", "best.json"):
        assert downloaded(look, name) == (kept.path / name).read_bytes()
    keep(look, "files")
    look.goto(f"{site.url}/runs/kept/report")
    assert downloaded(look, "model.safetensors") == (kept.path / "model.safetensors").read_bytes()
    look.screenshot(path=Path(os.environ.get("TAP_SCREENSHOTS") or kept.path) / "report-files.png")
    assert '<a href="model.safetensors">' in kept.report.read_text()  # beside it in the folder
    shutil.rmtree(kept.path)


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
        expect(look.get_by_text("on 200 images?")).to_be_visible()
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
    marked = RunFolder.create(theirs.with_name("marked"), Settings())
    text_of = (marked.path / "config.yaml").read_text()
    (marked.path / "config.yaml").write_text(text_of.replace("network: digits", 'network: "[/x]\\e]0;owned\\a"'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        assert tap("list", str(theirs.parent)) == Exit.OK
    listed = capsys.readouterr().out
    assert "[/x]]0;owned" in listed
    assert "\x1b]0" not in listed


@pytest.mark.parametrize(("body", "status"), [(b"network=%FF", 400), (b"seed=1%00", 400), (b"a" * 2**21, 413)])
def test_a_form_that_no_person_fills_in_starts_nothing(client: TestClient, body: bytes, status: int) -> None:
    assert client.post("/runs", content=body).status_code == status


def test_of_a_runs_folder_the_models_and_the_bits_are_served_and_nothing_else(run: RunFolder, cache: Path) -> None:
    folder = run.path
    (folder / "model-secret.txt").write_text("secret")
    (folder / "model-of-elsewhere.safetensors").symlink_to(folder / "config.yaml")
    (folder / "model.onnx").mkdir()
    served: dict[str, int] = {}
    with Conversations(cache) as conversations:
        client = TestClient(application(Searches(folder.parent), conversations, None), base_url="http://127.0.0.1:7860")
        names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
        for name in (*names, "model%2F..%2Fconfig.yaml", "model.safetensors%2F..%2Fconfig.yaml", "model"):
            answer = client.get(f"/runs/{run.name}/{name}")
            if answer.status_code == 200 and "attachment" in answer.headers.get("content-disposition", ""):
                served[name] = len(answer.content)
                assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.get("/runs/other/model.safetensors").status_code == 404
    assert served == {name: (folder / name).stat().st_size for name in ("best.json", "model.safetensors")}


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
