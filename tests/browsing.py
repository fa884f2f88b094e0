"""Chromium for tests of pages: where it is, and what is true of each of our pages in it."""

import contextlib
import json
import os
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
AXE = Path(os.environ.get("AXE_CORE", "/nowhere"))  # axe.min.js of the npm package axe-core


@contextlib.contextmanager
def chromium():
    """A browser; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, address, size, scheme="light"):
    """The page, and what its console says of errors."""
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = context.new_page()
    errors = []
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    return page, errors


def check_access(page):
    """No serious finding of axe."""
    if not AXE.exists():
        return
    page.evaluate(AXE.read_text("utf-8"))  # the page's own policy forbids other scripts
    found = page.evaluate("axe.run().then(result => result.violations)")
    grave = [one for one in found if one["impact"] in ("serious", "critical")]
    assert grave == [], json.dumps(grave, indent=1)[:3000]
