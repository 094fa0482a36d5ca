"""Steps that tests of the chat page share."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

from tests.browser.scripted import WAIT_SECONDS, Body

expect.set_options(timeout=WAIT_SECONDS * 1000)


def ask(page: Page, text: str = "hello") -> Locator:
    """Ask a question; the texts of its answers."""
    page.fill("#ask", text)
    page.press("#ask", "Enter")
    return page.locator(".turn").last.locator(".text")


def texts(body: Body) -> list[str]:
    """The texts of a request's messages."""
    return [message["content"] for message in body["messages"]]
