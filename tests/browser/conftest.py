"""Headless Chromium, a new profile for each test, and watches over everything that a page does."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.browser.scripted import WAIT_SECONDS, ScriptedPage, scripted_page

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
Open = Callable[..., Page]


def chromium() -> str:
    found = [path for name in PROGRAMS if (path := shutil.which(name)) is not None]
    if not found:
        pytest.exit("no chromium on this machine; apt-get install chromium", returncode=1)
    return found[0]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def real_url(small_dir: Path) -> Iterator[str]:
    """A server as users start it, of the golden model under two names."""
    words = ["--model", str(small_dir), "--port", "0", "--served_model_name", "before", "after"]
    with subprocess.Popen(
        [sys.executable, "-m", "serve.api", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        overdue = threading.Timer(START_SECONDS, process.kill)
        overdue.start()
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready at "):
                break
        else:
            pytest.fail(f"no server: {''.join(lines)}", pytrace=False)
        overdue.cancel()
        # What it goes on to say has to be read, or it would wait.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield lines[-1].removeprefix("ready at ").strip()
        process.terminate()


@pytest.fixture(scope="session")
def _scripted(real_url: str) -> Iterator[ScriptedPage]:
    with scripted_page(httpx.get(real_url)) as server:
        yield server


@pytest.fixture
def scripted(_scripted: ScriptedPage) -> ScriptedPage:
    """The scripted server as it is at first."""
    fresh = ScriptedPage(_scripted.page, 0)
    _scripted.script, _scripted.models, _scripted.key = fresh.script, fresh.models, fresh.key
    _scripted.bodies.clear()
    _scripted.left.clear()
    return _scripted


def of_origin(own: str, other: str) -> bool:
    return urlsplit(own)[:2] == urlsplit(other)[:2]


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Open a page in a profile of its own. Afterwards: it has asked nobody but its own server, and
    nothing in it has failed, run or been refused by its policy."""
    contexts, asked, faults = [], [], []

    def note(message: ConsoleMessage) -> None:
        # Chromium notes each response that is an error; those are the tests' own.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            faults.append(message.text)

    def open_page(url: str, width: int = 1280, height: int = 800, locale: str = "en-US") -> Page:
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, locale=locale)  # type: ignore[arg-type]
        contexts.append(context)
        context.set_default_timeout(WAIT_SECONDS * 1000)
        context.on("request", lambda request: asked.append((url, request.url)))
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", note)
        page.goto(url)
        page.wait_for_selector("#left option, dialog[open]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    inner = ("data", "blob")
    away = [to for own, to in asked if not of_origin(own, to) and urlsplit(to).scheme not in inner]
    assert asked and not away
    assert not faults


@pytest.fixture
def page(scripted: ScriptedPage, opened: Open) -> Page:
    """The page of the scripted server, in English, on a desk."""
    return opened(scripted.url)
