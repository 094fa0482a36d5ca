"""The chat page in a browser, on the real server and the golden model."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.browser.asking import ask
from tests.browser.conftest import Open


def test_two_names_of_a_model_answer_alike_and_go_on(real_url: str, opened: Open) -> None:
    page = opened(f"{real_url}/?left=before&right=after")
    page.click("#open-settings")
    page.fill("#field-temperature", "0")
    page.fill("#field-max_tokens", "8")
    page.click("#close-settings")
    for turn in range(2):
        answers = ask(page, "你好")
        figures = page.locator(".turn").nth(turn).locator(".figures")
        expect(figures).to_have_count(2)
        for side in range(2):
            expect(figures.nth(side)).to_contain_text("8 tokens")
            expect(figures.nth(side)).to_contain_text("cut off at max tokens")
        first, second = answers.all_text_contents()
        assert first and first == second
    expect(page.locator(".failure")).to_have_count(0)


def test_stop_and_a_question_beyond_the_context(real_url: str, opened: Open) -> None:
    page = opened(real_url)
    ask(page)
    page.wait_for_selector(".answer.live .text:not(:empty)")
    page.keyboard.press("Escape")
    expect(page.locator(".figures")).to_contain_text("stopped")
    page.click("#new")
    ask(page, "字" * 9000)
    expect(page.locator(".failure")).to_contain_text("too long for the model")
