"""A real browser for pages that lie on disk: no network, every complaint of the page kept."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
LOOK_S = 60.0


class Opened:
    """A page that is ready; `complaints` are what it printed to the console, its errors and its requests."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", self._note)

    def open(self, path: Path, fragment: str = "") -> None:
        self.page.goto(path.resolve().as_uri() + fragment)
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def walk(self) -> None:
        """Through the whole page, as a reader scrolls."""
        for view in self.page.query_selector_all(".view:not([hidden])"):
            view.scroll_into_view_if_needed()
            if view.query_selector(".plot"):
                self.page.wait_for_function("view => view.querySelector('.main-svg')", arg=view)

    def narrow(self, facet: str, *words: str) -> None:
        """Choose these words of a facet, and wait until all that is in sight shows it."""
        before = self.filtered
        self.page.click(f"[data-facet={facet}] summary")
        for word in words:
            self.page.get_by_label(word, exact=True).check()
        self.page.wait_for_function(
            "n => Number(document.documentElement.dataset.filtered) >= n", arg=before + len(words)
        )
        self.page.keyboard.press("Escape")

    @property
    def filtered(self) -> int:
        return int(self.page.evaluate("document.documentElement.dataset.filtered ?? 0"))

    def drawn(self, anchor: str) -> list[dict[str, Any]]:
        """The traces of a figure that show something."""
        data = f"document.getElementById('figure-{anchor}').data"
        return self.page.evaluate(f"{data}.filter(t => t.visible !== false && (t.z ?? t.x).length && t.meta)")

    def _note(self, request: Any) -> None:
        if not request.url.startswith(("file:", "blob:", "data:")):
            self.complaints.append(f"request: {request.url}")


@contextlib.contextmanager
def browser_page(**options: Any) -> Iterator[Opened]:
    assert BROWSER is not None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        context = browser.new_context(offline=True, **options)
        context.set_default_timeout(LOOK_S * 1000)
        yield Opened(context.new_page())
        browser.close()
