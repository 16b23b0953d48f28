"""The page of `tap-agent ui`: the runs, one of them live, and conversations about its proxies.

It is a Starlette application of a dozen routes, without a JavaScript framework. Gradio, the alternative, brings 341 MB,
fonts and analytics to switch off, and a look and an API of its own. Here a view is a plain page with an address, and a
script asks for it again while something goes on and replaces the parts that differ. Nothing is loaded from elsewhere:
see the policy in `tap_agent.page.guard`.

Whoever reaches the page can do what its user can do on the command line: a run may import a factory, read any file as
weights, and send the key of the language model to any address. So it listens on the loopback alone, unless it has a
password.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
import webbrowser
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

import plotly
import uvicorn
from plotly.offline import get_plotlyjs
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from tap_agent.page import views
from tap_agent.page.chat import Chat
from tap_agent.page.conversations import Conversations
from tap_agent.page.form import fields
from tap_agent.page.guard import REPORT, Guard
from tap_agent.page.searches import Searches
from tap_agent.page.views import VIEWS
from tap_agent.report import html
from tap_agent.runs.folder import RunFolder, RunMistake
from tap_agent.runs.progress import Overview, read
from tap_agent.runs.result import Result
from tap_agent.serving.address import is_loopback, listen
from tap_agent.serving.origin import SameOrigin
from tap_agent.settings.read import ConfigMistake
from tap_eval.mistake import Mistake

PASSWORD = "TAP_UI_PASSWORD"  # noqa: S105 the name of the variable that holds it
_FILES = Path(__file__).parent / "templates"
_SHARED = Path(html.__file__).parent / "templates"
_ALIVE = ("starting", "running", "stopping")
_LOG_SHOWN = 20_000
_LONGEST_FORM = 2**20


def serve(
    folder: Path, cache: Path, host: str, port: int, password: str | None, *, browser: bool, tell: Callable[[str], None]
) -> None:
    """Serves the page of the runs in `folder` until Ctrl-C; `tell` is given its address once it is listened on.

    Raises `PortMistake`, and `ConfigMistake` where a password is missing.
    """
    if not is_loopback(host) and not password:
        raise ConfigMistake(
            f"{PASSWORD} is not set: at --host {host} others reach the page and can do what you can, "
            "so put a password in it, or leave --host out."
        )
    with listen(host, port) as listening, Conversations(cache) as conversations:
        at = f"[{host}]" if ":" in host else host
        url = f"http://{at}:{listening.getsockname()[1]}"
        tell(f"{url} shows the runs in {folder}; Ctrl-C ends the page, not the runs.")
        if browser and (sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
            webbrowser.open(url)
        app = application(Searches(folder), conversations, password)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listening])


def application(searches: Searches, conversations: Conversations, password: str | None) -> Starlette:
    """The page as an ASGI application."""
    page = Page(searches, conversations)
    return Starlette(
        routes=[
            Route("/", page.index),
            Route("/runs", page.start, methods=["POST"]),
            Route("/runs/{name}", page.show),
            Route("/runs/{name}/report", page.report),
            Route("/runs/{name}/best.json", page.model),
            Route("/runs/{name}/model{ending}", page.model),
            Route("/runs/{name}/stop", page.stop, methods=["POST"]),
            Route("/runs/{name}/resume", page.resume, methods=["POST"]),
            Route("/runs/{name}/{view}", page.show),
            Route("/runs/{name}/{view}/{proxy}", page.show),
            Route("/runs/{name}/chat/{proxy}", page.say, methods=["POST"]),
            Route("/static/{file}", page.static),
        ],
        middleware=[
            Middleware(SameOrigin, host=None if password else "127.0.0.1"),
            Middleware(Guard, password=password),
        ],
        exception_handlers={404: page.missing, Mistake: page.refuse, ClientDisconnect: page.forget},
    )


class Page:
    """The routes. A view is answered with 304 where nothing has changed; a form with 204, or with a sentence."""

    def __init__(self, searches: Searches, conversations: Conversations) -> None:
        self._searches = searches
        self._conversations = conversations
        self._since = secrets.token_hex(4)

    def index(self, request: Request) -> Response:
        """The form that starts a run, with what was given `from` one before."""
        values = {"fields": fields("run", self._searches.form(request.query_params.get("from", ""))), "name": ""}
        return self._answer(request, "start", self._searches.overviews(), [], lambda: values)

    def show(self, request: Request) -> Response:
        """One view of one run."""
        name, kind = request.path_params["name"], request.path_params.get("view", "search")
        run, process, overviews = self._searches.run(name), self._searches.process(name), self._searches.overviews()
        if kind not in VIEWS or not (run or process):
            raise HTTPException(404)
        overview = next((each for each in overviews if each.name == name), Overview(name, "interrupted"))
        shown = {
            "name": name,
            "overview": overview,
            "view": kind,
            "views": VIEWS,
            "failure": process and process.failure,
        }
        shown["limits"] = fields("resume", {})
        if run is None or overview.state == "unreadable":
            shown["log"] = process.log if process else ""
            return self._answer(request, "early", overviews, shown.values(), lambda: shown)
        history, events = read(run, live=overview.state in _ALIVE), run.events()
        proxy = request.path_params.get("proxy") or history.best
        if proxy and proxy not in [each.name for each in history.everyone]:
            raise HTTPException(404)
        log = run.log.read_text(errors="replace")[-_LOG_SHOWN:] if kind == "log" and run.log.exists() else ""

        with ExitStack() as held:
            chats = kind == "chat" and isinstance(history, Result)
            chat = held.enter_context(self._conversations.opened(run, str(proxy))) if chats else None

            def values() -> dict[str, Any]:
                made = views.show(kind, run, history, proxy, events, chat)
                return {**shown, "proxy": proxy, "log": log, **views.progress(history, run.settings(), events), **made}

            facts = [len(events), len(history.everyone), shown["failure"], chat and chat.stamp, log]
            return self._answer(request, "run", overviews, facts, values)

    def report(self, request: Request) -> Response:
        """The report of a run that has ended."""
        run = self._run(request)
        if not run.report.exists():
            raise HTTPException(404)
        return FileResponse(run.report, headers={"Content-Security-Policy": REPORT})

    def model(self, request: Request) -> Response:
        """A file that a run has left for others to run, or its bits; no other file of the folder is."""
        wanted = str(request.scope["path"]).rpartition("/")[2]
        path = next((path for path in self._run(request).models if path.name == wanted), None)
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    async def start(self, request: Request) -> Response:
        """Starts a run, and says where it is."""
        name = await run_in_threadpool(self._searches.start, await _form(request))
        return Response(status_code=201, headers={"Location": f"/runs/{quote(name)}"})

    def stop(self, request: Request) -> Response:
        """Stops a run."""
        self._searches.stop(request.path_params["name"])
        return Response(status_code=204)

    async def resume(self, request: Request) -> Response:
        """Resumes a run."""
        await run_in_threadpool(self._searches.resume, self._run(request), await _form(request))
        return Response(status_code=204)

    async def say(self, request: Request) -> Response:
        """What a person does in a conversation: speaks, answers, goes on, lets go, writes code, changes the model."""
        await run_in_threadpool(self._say, self._run(request), request.path_params["proxy"], await _form(request))
        return Response(status_code=204)

    def _say(self, run: RunFolder, proxy: str, form: Mapping[str, str]) -> None:
        if "llm" in form:
            return self._conversations.change_model(run, proxy, form["llm"], form.get("base_url", ""))
        with self._conversations.opened(run, proxy) as chat:
            return self._turn(chat, form)

    @staticmethod
    def _turn(chat: Chat, form: Mapping[str, str]) -> None:
        answers = {name.removeprefix("answer-"): text for name, text in form.items() if name.startswith("answer-")}
        if "stop" in form:
            return chat.conversation.stop()
        if answers:
            return chat.turn(lambda conversation: conversation.answer(answers), goes_on=True)
        if "again" in form:
            return chat.turn(lambda conversation: conversation.again(), goes_on=True)
        if chat.conversation.questions:
            raise RunMistake("it has asked something: answer that first.")
        text = f"use\n```python\n{form['code'].strip()}\n```" if "code" in form else form.get("say", "").strip()
        return chat.turn(lambda conversation: conversation.say(text)) if text else None

    def static(self, request: Request) -> Response:
        """The style, the script, and Plotly's."""
        match request.path_params["file"]:
            case "plotly.js":
                kept = {"Cache-Control": "max-age=31536000, immutable"}  # its address has the version
                return Response(get_plotlyjs(), media_type="text/javascript", headers=kept)
            case "page.js":
                return FileResponse(_FILES / "page.js")
            case "page.css":
                style = (_SHARED / "style.css").read_text() + (_FILES / "page.css").read_text()
                return Response(style, media_type="text/css")
            case _:
                raise HTTPException(404)

    def missing(self, request: Request, error: Exception) -> Response:
        """An address that leads nowhere."""
        shown = {"name": "", "notice": f"There is nothing at {request.url.path}: choose a run."}
        return self._answer(request, "missing", self._searches.overviews(), [], lambda: shown, 404)

    def refuse(self, request: Request, mistake: Exception) -> Response:
        """A mistake is its sentence."""
        return PlainTextResponse(str(mistake), 409)

    def forget(self, request: Request, gone: Exception) -> Response:
        """A form whose sender went away in the middle, which starts nothing."""
        return Response(status_code=400)

    def _run(self, request: Request) -> RunFolder:
        if (run := self._searches.run(request.path_params["name"])) is None:
            raise HTTPException(404)
        return run

    def _answer(
        self, request: Request, name: str, overviews: Sequence[Overview], facts: Iterable[object],
        values: Callable[[], Mapping[str, Any]], status: int = 200,
    ) -> Response:  # fmt: skip
        """The page of a template, unless the script that asks has what the same facts gave."""
        stamp = hashlib.sha256(repr((self._since, overviews, *facts)).encode()).hexdigest()[:16]
        if request.headers.get("if-none-match") == stamp:
            return Response(status_code=304)
        shown = dict(values())
        alive = any(overview.state in _ALIVE for overview in overviews)
        every = 300 if shown.get("busy") else 1000 if alive else 5000
        page = html.template(name, "tap_agent.page").render(
            runs=overviews, folder=self._searches.folder, every=every, plotly=plotly.__version__,
            drawing=views.drawing, **shown,
        )  # fmt: skip
        return HTMLResponse(page, status, {"ETag": stamp})


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form; one that is no text, or longer than any that a person fills in, is refused."""
    sent = bytearray()
    async for part in request.stream():
        sent += part
        if len(sent) > _LONGEST_FORM:
            raise HTTPException(413)
    try:
        form = dict(parse_qsl(sent.decode(), keep_blank_values=True, errors="strict"))
    except ValueError as error:
        raise HTTPException(400) from error
    if any("\0" in text for text in form.values()):
        raise HTTPException(400)
    return form
