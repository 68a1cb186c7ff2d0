"""Once, widgets in a real browser: JupyterLab shows the explorer and hears a click."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
CELLS = [
    "import moelab\n"
    "from moelab.widgets import explorer, live\n"
    "lab = moelab.load('lab', capacity=16)\n"
    "with lab.record() as recording:\n"
    "    lab.generate('How do I list the files in a folder with `ls`?', 24, temperature=0)\n"
    "view = explorer(recording)\n"
    "view",
    "panel = live(lab, capacity=12, on_miss='drop', max_tokens=400)\npanel",
]
SETTINGS = {  # no questions that would stand before the notebook
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
WAIT = 45_000
"""Milliseconds; a busy machine is slow."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None
        or importlib.util.find_spec("playwright") is None
        or importlib.util.find_spec("jupyterlab") is None,
        reason="no browser or JupyterLab here",
    ),
]


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[str]:
    """The address of a notebook in a JupyterLab that listens to this machine alone."""
    cells: list[dict[str, Any]] = [
        {"cell_type": "code", "execution_count": None, "id": f"cell{i}", "metadata": {},
         "outputs": [], "source": source}
        for i, source in enumerate(CELLS)
    ]  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    work = tmp_path / "work"
    work.mkdir()
    (work / "widgets.ipynb").write_text(json.dumps(book), encoding="utf-8")
    for name, settings in SETTINGS.items():
        file = tmp_path / "JUPYTERLAB_SETTINGS_DIR" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = {name: str(tmp_path / name) for name in (
        "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
        "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR",
    )}  # fmt: skip
    root = str(Path(__file__).parent.parent)
    log = (tmp_path / "jupyter.log").open("wb")
    server = subprocess.Popen(
        [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
            "--expose-app-in-browser", f"--ServerApp.root_dir={work}", "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={token}", "--LabApp.news_url=",
        ],
        env={**os.environ, **own, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"},
        stdout=log, stderr=log,
    )  # fmt: skip
    try:
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "jupyter.log").read_text()[-2000:]
            try:
                url = f"http://127.0.0.1:{port}/api/status?token={token}"
                urllib.request.urlopen(url, timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        # With a kernel from the start, so that the page need not ask for one.
        session = {"path": "widgets.ipynb", "name": "widgets.ipynb", "type": "notebook",
                   "kernel": {"name": "python3"}}  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/sessions",
            json.dumps(session).encode(),
            {"Authorization": f"token {token}", "Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=30).close()
        yield f"http://127.0.0.1:{port}/lab/tree/widgets.ipynb?token={token}"
    finally:
        server.terminate()  # which ends its kernels as well
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def test_a_click_in_a_browser_changes_the_panel(notebook: str, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    pictures = Path(os.environ.get("MOELAB_SCREENSHOTS", tmp_path))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1250})
        page.set_default_timeout(WAIT)
        try:
            page.goto(notebook)
            page.wait_for_function("window.jupyterapp && document.querySelector('.jp-Notebook')")
            page.wait_for_selector(".jp-Notebook .jp-CodeCell")
            page.wait_for_function(  # else it would ask which kernel to run
                "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status"
                " == 'idle'"
            )
            # Not awaited: the promise is kept when all cells are done, or never.
            page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
            _explore(page, pictures)
            _run_and_cancel(page, pictures)
        except Exception:
            page.screenshot(path=pictures / "failed.png")
            raise
        finally:
            browser.close()


def _explore(page: Any, pictures: Path) -> None:
    view = page.locator(".moelab-explorer")
    view.wait_for()
    tokens = view.locator("button:not([disabled])").filter(has_text="files")
    tokens.first.wait_for()
    assert "Pick a token" in view.inner_text()
    tokens.first.click()
    panel = view.locator("table").first
    panel.wait_for()
    assert panel.locator("tr").count() == 8, "a row a layer"
    first = panel.inner_text()
    assert "token " in view.inner_text()
    view.locator("button").filter(has_text="list").first.click()
    page.wait_for_function(
        "old => document.querySelector('.moelab-explorer table').innerText != old", arg=first
    )
    # One of its experts, from the row of shortcuts: its tokens are marked.
    view.get_by_title("see the tokens of expert").first.click()
    page.wait_for_function(
        "document.querySelector('.moelab-explorer').innerText.includes('chosen by')"
    )
    marked = page.evaluate(
        "[...document.querySelectorAll('.moelab-explorer button')]"
        ".filter(b => b.style.borderBottomWidth == '3px').length"
    )
    assert marked > 0
    page.screenshot(path=pictures / "explorer.png")


def _run_and_cancel(page: Any, pictures: Path) -> None:
    from playwright.sync_api import expect

    panel = page.locator(".moelab-live")
    panel.scroll_into_view_if_needed()
    panel.get_by_role("button", name="Run").click()
    page.wait_for_function(
        "/[1-9][0-9]* tokens/.test(document.querySelector('.moelab-live').innerText)"
    )
    panel.get_by_role("button", name="Cancel").click()
    page.wait_for_function(
        "/cancelled|part at|the same/.test(document.querySelector('.moelab-live').innerText)"
    )
    expect(panel.get_by_role("button", name="Run")).to_be_enabled(timeout=WAIT)
    expect(panel.get_by_role("button", name="Cancel")).to_be_disabled()
    panel.get_by_text("exact: on a miss").scroll_into_view_if_needed()
    page.screenshot(path=pictures / "live.png")
