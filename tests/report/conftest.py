"""A real browser, started once, by Playwright with the system's Chromium; a test is skipped where there is none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.pages import PROMPT, TARGET, demo

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 30_000  # milliseconds; machines that are shared are slow


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if BROWSER is None:
        lacking = pytest.fail if os.environ.get("CI") else pytest.skip
        lacking("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Opens a page; at the end nothing was said on its console, and nothing was asked of a network."""
    said, asked, contexts = [], [], []

    def open_page(path: Path, fragment: str = "", scripts: bool = True, **settings):
        settings = {"viewport": {"width": 1280, "height": 900}, **settings}
        contexts.append(browser.new_context(java_script_enabled=scripts, accept_downloads=True, **settings))
        opened = contexts[-1].new_page()
        opened.set_default_timeout(WAIT)
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(f"{path.as_uri()}{fragment}")
        if scripts:
            opened.wait_for_selector("main")
        return opened

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert asked and all(url.startswith(("file://", "data:", "blob:")) for url in asked), asked


@pytest.fixture(scope="session")
def report(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "report.html"
    demo().report(PROMPT, TARGET).to_html(path)
    return path
