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
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from tap_agent.course import Glance, read
from tap_agent.folder import RunFolder, RunMistake
from tap_agent.page import view
from tap_agent.page.desk import COMMON, LIMITS, Desk, fields
from tap_agent.page.guard import REPORT, Guard
from tap_agent.page.talk import Talk
from tap_agent.page.view import VIEWS
from tap_agent.port import is_loopback, listen
from tap_agent.report import template
from tap_agent.result import Result
from tap_agent.settings import ConfigMistake
from tap_eval.mistake import Mistake

PASSWORD = "TAP_UI_PASSWORD"  # noqa: S105 the name of the variable that holds it
_FILES = Path(__file__).parent.parent / "templates"
_ALIVE = ("starting", "running", "stopping")
_LOG_SHOWN = 20_000
_LONGEST_FORM = 2**20


def serve(
    desk: Desk, host: str, port: int, password: str | None, *, browser: bool, tell: Callable[[str], None]
) -> None:
    """Serves the page until Ctrl-C; `tell` is given its address once it is listened on.

    Raises `PortMistake`, and `ConfigMistake` where a password is missing.
    """
    if not is_loopback(host) and not password:
        raise ConfigMistake(
            f"{PASSWORD} is not set: at --host {host} others reach the page and can do what you can, "
            "so put a password in it, or leave --host out."
        )
    with listen(host, port) as listening:
        at = f"[{host}]" if ":" in host else host
        url = f"http://{at}:{listening.getsockname()[1]}"
        tell(f"{url} shows the runs in {desk.folder}; Ctrl-C ends the page, not the runs.")
        if browser and (sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
            webbrowser.open(url)
        config = uvicorn.Config(application(desk, password), log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listening])


def application(desk: Desk, password: str | None) -> Starlette:
    """The page as an ASGI application."""
    page = Page(desk)
    return Starlette(
        routes=[
            Route("/", page.index),
            Route("/runs", page.start, methods=["POST"]),
            Route("/runs/{name}", page.show),
            Route("/runs/{name}/report", page.report),
            Route("/runs/{name}/stop", page.stop, methods=["POST"]),
            Route("/runs/{name}/resume", page.resume, methods=["POST"]),
            Route("/runs/{name}/{view}", page.show),
            Route("/runs/{name}/{view}/{proxy}", page.show),
            Route("/runs/{name}/talk/{proxy}", page.say, methods=["POST"]),
            Route("/static/{file}", page.static),
        ],
        middleware=[Middleware(Guard, password=password)],
        exception_handlers={404: page.missing, Mistake: page.refuse},
    )


class Page:
    """The routes. A view is answered with 304 where nothing has changed; a form with 204, or with a sentence."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._since = secrets.token_hex(4)

    def index(self, request: Request) -> Response:
        """The form that starts a run, with what was given `from` one before."""
        every = fields(self._desk.form(request.query_params.get("from", "")))
        values = {"common": every[:COMMON], "more": every[COMMON:], "name": ""}
        return self._answer(request, "start", self._desk.glances(), [], lambda: values)

    def show(self, request: Request) -> Response:
        """One view of one run."""
        name, kind = request.path_params["name"], request.path_params.get("view", "search")
        run, launch, glances = self._desk.run(name), self._desk.launch(name), self._desk.glances()
        if kind not in VIEWS or not (run or launch):
            raise HTTPException(404)
        glance = next((each for each in glances if each.name == name), Glance(name, "interrupted"))
        shown = {"name": name, "glance": glance, "view": kind, "views": VIEWS, "failure": launch and launch.failure}
        shown["limits"] = [each for each in fields({}) if each["name"] in LIMITS]
        if run is None or glance.state == "unreadable":
            shown["log"] = launch.log if launch else ""
            return self._answer(request, "early", glances, shown.values(), lambda: shown)
        course, events = read(run, live=glance.state in _ALIVE), run.events()
        proxy = request.path_params.get("proxy") or course.best
        if proxy and proxy not in [each.name for each in course.everyone]:
            raise HTTPException(404)
        log = run.log.read_text(errors="replace")[-_LOG_SHOWN:] if kind == "log" and run.log.exists() else ""

        with ExitStack() as held:
            talks = kind == "talk" and isinstance(course, Result)
            talk = held.enter_context(self._desk.talk(run, str(proxy))) if talks else None

            def values() -> dict[str, Any]:
                made = view.show(kind, run, course, proxy, events, talk)
                return {**shown, "proxy": proxy, "log": log, **view.progress(course, run.settings(), events), **made}

            facts = [len(events), len(course.everyone), shown["failure"], talk and talk.stamp, log]
            return self._answer(request, "run", glances, facts, values)

    def report(self, request: Request) -> Response:
        """The report of a run that has ended."""
        run = self._run(request)
        if not run.report.exists():
            raise HTTPException(404)
        return FileResponse(run.report, headers={"Content-Security-Policy": REPORT})

    async def start(self, request: Request) -> Response:
        """Starts a run, and says where it is."""
        name = await run_in_threadpool(self._desk.start, await _form(request))
        return Response(status_code=201, headers={"Location": f"/runs/{quote(name)}"})

    def stop(self, request: Request) -> Response:
        """Stops a run."""
        self._desk.stop(request.path_params["name"])
        return Response(status_code=204)

    async def resume(self, request: Request) -> Response:
        """Resumes a run."""
        await run_in_threadpool(self._desk.resume, self._run(request), await _form(request))
        return Response(status_code=204)

    async def say(self, request: Request) -> Response:
        """What a person does in a conversation: speaks, answers, goes on, lets go, writes code, changes the model."""
        await run_in_threadpool(self._say, self._run(request), request.path_params["proxy"], await _form(request))
        return Response(status_code=204)

    def _say(self, run: RunFolder, proxy: str, form: Mapping[str, str]) -> None:
        if "llm" in form:
            return self._desk.change_model(run, proxy, form["llm"], form.get("base_url", ""))
        with self._desk.talk(run, proxy) as talk:
            return self._turn(talk, form)

    @staticmethod
    def _turn(talk: Talk, form: Mapping[str, str]) -> None:
        answers = {name.removeprefix("answer-"): text for name, text in form.items() if name.startswith("answer-")}
        if "stop" in form:
            return talk.conversation.stop()
        if answers:
            return talk.turn(lambda conversation: conversation.answer(answers), goes_on=True)
        if "again" in form:
            return talk.turn(lambda conversation: conversation.again(), goes_on=True)
        if talk.conversation.questions:
            raise RunMistake("it has asked something: answer that first.")
        text = f"use\n```python\n{form['code'].strip()}\n```" if "code" in form else form.get("say", "").strip()
        return talk.turn(lambda conversation: conversation.say(text)) if text else None

    def static(self, request: Request) -> Response:
        """The style, the script, and Plotly's."""
        match request.path_params["file"]:
            case "plotly.js":
                kept = {"Cache-Control": "max-age=31536000, immutable"}  # its address has the version
                return Response(get_plotlyjs(), media_type="text/javascript", headers=kept)
            case "page.js":
                return FileResponse(_FILES / "page.js")
            case "page.css":
                style = (_FILES / "style.css").read_text() + (_FILES / "page.css").read_text()
                return Response(style, media_type="text/css")
            case _:
                raise HTTPException(404)

    def missing(self, request: Request, error: Exception) -> Response:
        """An address that leads nowhere."""
        shown = {"name": "", "notice": f"There is nothing at {request.url.path}: choose a run."}
        return self._answer(request, "missing", self._desk.glances(), [], lambda: shown, 404)

    def refuse(self, request: Request, mistake: Exception) -> Response:
        """A mistake is its sentence."""
        return PlainTextResponse(str(mistake), 409)

    def _run(self, request: Request) -> RunFolder:
        if (run := self._desk.run(request.path_params["name"])) is None:
            raise HTTPException(404)
        return run

    def _answer(
        self, request: Request, name: str, glances: Sequence[Glance], facts: Iterable[object],
        values: Callable[[], Mapping[str, Any]], status: int = 200,
    ) -> Response:  # fmt: skip
        """The page of a template, unless the script that asks has what the same facts gave."""
        stamp = hashlib.sha256(repr((self._since, glances, *facts)).encode()).hexdigest()[:16]
        if request.headers.get("if-none-match") == stamp:
            return Response(status_code=304)
        shown = dict(values())
        alive = any(glance.state in _ALIVE for glance in glances)
        every = 300 if shown.get("busy") else 1000 if alive else 5000
        page = template(name).render(
            runs=glances, folder=self._desk.folder, every=every, plotly=plotly.__version__,
            drawing=view.drawing, **shown,
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
