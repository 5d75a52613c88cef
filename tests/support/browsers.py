"""A headless browser of this machine."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def chromium(*arguments: str):
    """The system's Chromium, driven by playwright; without one of them the test is skipped."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *arguments])
        yield browser
        browser.close()
