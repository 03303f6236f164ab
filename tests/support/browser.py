"""A page in a real browser: the machine's Chromium, without a screen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
# the sandbox cannot be had as root; the others keep the browser from looking for its makers
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


class Seen(msgspec.Struct):
    """What the browser saw. `problems`: errors and warnings on its console; `requests`: what it asked for
    beside the page; `counts`: elements by selector."""

    title: str
    text: str
    problems: list[str]
    requests: list[str]
    counts: dict[str, int]


def open_page(page: Path, picture: Path, *counted: str, wait_for: str = "body") -> Seen:
    """Opens a file, waits until there is an element `wait_for`, and takes a picture. Skips the test where
    there is no browser, which CI takes for an error."""
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None and not os.environ.get("CI"):
        pytest.skip("no Chromium here; .ci/run installs one")
    problems: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=ARGUMENTS)
        tab = chromium.new_page(viewport={"width": 1200, "height": 900})
        _listen(tab, problems, requests)
        tab.goto(page.as_uri())
        tab.wait_for_selector(wait_for, timeout=60_000)
        tab.screenshot(path=str(picture), full_page=True)
        counts = {selector: tab.locator(selector).count() for selector in counted}
        seen = Seen(tab.title(), tab.inner_text("body"), problems, [], counts)
        chromium.close()
    own = (page.as_uri(), "data:", "blob:")
    seen.requests = [url for url in requests if not url.startswith(own)]
    return seen


def _listen(tab: Page, problems: list[str], requests: list[str]) -> None:
    tab.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
