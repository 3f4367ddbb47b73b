"""A real browser for tests of web pages; tests are skipped without one."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def started_browser() -> Iterator[Any]:
    """A running Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    with playwright.sync_playwright() as started:
        if program is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("needs a browser: apt-get install chromium, or playwright install chromium")
        instance = started.chromium.launch(executable_path=program, args=["--no-sandbox"])  # root has no sandbox
        yield instance
        instance.close()


@dataclass
class Watched:
    """An open page, with its errors and requests."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def network_requests(self) -> list[str]:
        """Requests of anything but files and data in the page."""
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]
