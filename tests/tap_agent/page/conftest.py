"""The page in a real browser, over an empty folder of runs.

Screenshots are kept in the folder that `TAP_SCREENSHOTS` names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

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
