"""The files that a run offers: saved from its result and its report, and no other file of its folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect
from starlette.testclient import TestClient

from tap_agent.page.app import application
from tap_agent.page.conversations import Conversations
from tap_agent.page.searches import Searches
from tap_agent.runs.folder import RunFolder
from tests.tap_agent.page.conftest import Site

NETWORKS = ("model.safetensors", "model.onnx")


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
    for name in (*NETWORKS, "best.json"):
        assert downloaded(look, name) == (kept.path / name).read_bytes()
    best = kept.finished().best
    expect(look.locator("pre.command").first).to_contain_text(f"tap-agent apply {kept.path}/proxies/{best}.py")
    keep(look, "files")
    look.goto(f"{site.url}/runs/kept/report")
    assert downloaded(look, "model.safetensors") == (kept.path / "model.safetensors").read_bytes()
    look.screenshot(path=Path(os.environ.get("TAP_SCREENSHOTS") or kept.path) / "report-files.png")
    assert '<a href="model.safetensors">' in kept.report.read_text()  # beside it in the folder
    shutil.rmtree(kept.path)


def test_of_a_runs_folder_the_models_and_the_bits_are_served_and_nothing_else(run: RunFolder, cache: Path) -> None:
    folder = run.path
    (folder / "model-secret.txt").write_text("secret")
    (folder / "model-of-elsewhere.safetensors").symlink_to(folder / "config.yaml")
    (folder / "model-2.onnx").mkdir()
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
    assert served == {name: (folder / name).stat().st_size for name in ("best.json", *NETWORKS)}
