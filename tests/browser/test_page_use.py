"""The chat page in a browser: keys, languages, past chats, and a phone."""

from __future__ import annotations

import json
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.browser.asking import ask, texts
from tests.browser.conftest import Open
from tests.browser.scripted import WAIT_SECONDS, Gate, ScriptedPage, saying


def test_enter_sends_and_shift_enter_breaks_the_line(page: Page, scripted: ScriptedPage) -> None:
    page.keyboard.type("one")  # the box has the focus from the start
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#ask")).to_have_value("one\ntwo")
    page.keyboard.press("Enter")
    expect(page.locator(".text")).to_have_text("ok")
    expect(page.locator("#ask")).to_have_value("")
    expect(page.locator("#ask")).to_be_focused()
    page.keyboard.press("Enter")  # there is nothing to send
    page.keyboard.type("  ")
    page.keyboard.press("Enter")
    assert [texts(body) for body in scripted.bodies] == [["one\ntwo"]]


def test_enter_that_ends_a_composition_does_not_send(page: Page, scripted: ScriptedPage) -> None:
    keyboard = page.context.new_cdp_session(page)
    composing = {"text": "ni", "selectionStart": 2, "selectionEnd": 2}
    keyboard.send("Input.imeSetComposition", composing)
    # Of a key that the input method takes only this arrives.
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    keyboard.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
    keyboard.send("Input.dispatchKeyEvent", {"type": "keyUp", **enter})
    expect(page.locator("#ask")).to_have_value("ni")
    keyboard.send("Input.insertText", {"text": "你"})
    expect(page.locator("#ask")).to_have_value("你")
    # Safari has ended the composition by then, and tells it by the code alone.
    safari = "new KeyboardEvent('keydown', {key: 'Enter', keyCode: 229, bubbles: true})"
    page.evaluate(f"document.getElementById('ask').dispatchEvent({safari})")
    assert page.locator(".turn").count() == 0 and not scripted.bodies
    page.keyboard.press("Enter")
    expect(page.locator(".text")).to_have_text("ok")
    assert texts(scripted.bodies[0]) == ["你"]


def test_escape_stops(page: Page, scripted: ScriptedPage) -> None:
    scripted.script = saying("begun", Gate())
    expect(ask(page)).to_have_text("begun")
    page.keyboard.press("Escape")
    expect(page.locator(".figures")).to_contain_text("stopped")
    assert scripted.left.wait(WAIT_SECONDS)


def test_nothing_is_sent_while_an_answer_comes(page: Page, scripted: ScriptedPage) -> None:
    gate = Gate()
    scripted.script = saying("begun", gate)
    expect(ask(page)).to_have_text("begun")
    page.keyboard.type("next")
    page.keyboard.press("Enter")
    expect(page.locator("#ask")).to_have_value("next")
    gate.open()
    expect(page.locator("#send")).to_be_enabled()
    assert len(scripted.bodies) == 1


def test_the_language_is_the_browsers_until_it_is_switched(
    scripted: ScriptedPage, opened: Open
) -> None:
    page = opened(scripted.url, locale="zh-CN")
    expect(page.locator("#new")).to_have_text("新对话")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(ask(page)).to_have_text("ok")
    page.click("#language")
    expect(page.locator("#new")).to_have_text("New chat")
    expect(page.locator(".figures")).to_contain_text("3 tokens")
    page.reload()
    expect(page.locator("#new")).to_have_text("New chat")
    expect(page.locator("html")).to_have_attribute("lang", "en")


def test_a_text_names_its_language(page: Page, scripted: ScriptedPage) -> None:
    """An English page would else show Japanese forms of some Chinese letters."""
    scripted.script = saying("直角")
    expect(ask(page, "right angle")).to_have_attribute("lang", "zh-CN")
    expect(page.locator(".said")).to_have_attribute("lang", "")


def test_both_languages_have_all_words(page: Page) -> None:
    words = page.evaluate("WORDS")
    assert words["en"].keys() == words["zh"].keys()
    for name, text in words["en"].items():
        assert text.count("{") == words["zh"][name].count("{"), name
    used = "one => [one.dataset.word, one.dataset.say, one.dataset.hint]"
    all_of = "[...document.querySelectorAll('[data-word], [data-say], [data-hint]')]"
    names = page.evaluate(f"{all_of}.flatMap({used}).filter(Boolean)")
    assert names and set(names) <= words["en"].keys()


def test_chats_are_kept_renamed_exported_and_deleted(
    page: Page, scripted: ScriptedPage, tmp_path: Path
) -> None:
    expect(ask(page, "the first chat")).to_have_text("ok")
    page.click("#new")
    expect(ask(page, "a second chat, whose name is cut after some of its words")).to_have_text("ok")
    titles = page.locator("#chats .title")
    expect(titles).to_have_text(["a second chat, whose name is cut…", "the first chat"])
    page.reload()
    titles.last.click()
    expect(page.locator(".said")).to_have_text("the first chat")
    expect(page.locator(".text")).to_have_text("ok")
    page.once("dialog", lambda dialog: dialog.accept("renamed"))
    page.get_by_role("button", name="Rename").click()
    expect(titles.last).to_have_text("renamed")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export", exact=True).click()
    saved.value.save_as(tmp_path / "chat.json")
    (row,) = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert saved.value.suggested_filename == "renamed.json" and row["model"] == "base"
    assert row["messages"] == [
        {"role": "user", "content": "the first chat"},
        {"role": "assistant", "content": "ok"},
    ]
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Delete").click()
    expect(titles).to_have_count(2)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(titles).to_have_count(1)
    expect(page.locator("#hello")).to_be_visible()
    page.reload()
    expect(titles).to_have_count(1)


def test_an_export_of_two_models_has_a_row_for_each(page: Page, scripted: ScriptedPage) -> None:
    page.click("#compare")
    expect(ask(page)).to_have_text(["ok", "ok"])
    rows = page.evaluate("exported([...chats.values()])")
    assert [row["model"] for row in rows] == ["base", "tuned"]


def test_a_chat_whose_browser_died_is_there_with_a_retry(
    page: Page, scripted: ScriptedPage
) -> None:
    answer = {"model": "base", "text": "begun", "state": "live"}
    turns = [{"question": "and?", "answers": [answer]}]
    chat = {"id": "x", "title": "t", "created": "2026", "system": "", "turns": turns}
    page.evaluate("text => localStorage.setItem('qwen-ds.chat.x', text)", json.dumps(chat))
    page.reload()
    page.locator("#chats .title").click()
    expect(page.locator(".text")).to_have_text("begun")
    scripted.script = saying("whole")
    page.locator(".failure").get_by_role("button", name="Retry").click()
    expect(page.locator(".text")).to_have_text("whole")


def test_what_came_before_the_page_was_closed_is_kept(page: Page, scripted: ScriptedPage) -> None:
    scripted.script = saying("begun", Gate())
    expect(ask(page)).to_have_text("begun")
    page.reload()
    page.locator("#chats .title").click()
    expect(page.locator(".text")).to_have_text("begun")


def test_stored_things_that_are_no_chats_are_left_alone(page: Page, scripted: ScriptedPage) -> None:
    damaged = {
        "qwen-ds.chat.a": "{", "qwen-ds.chat.b": '{"id": "b"}', "qwen-ds.chat.c": "null",
        "qwen-ds.chat.d": '{"id": "d", "title": "", "created": "", "system": "", "turns": [{}]}',
        "qwen-ds.settings": '{"sampling": null, "language": "xx", "compare": 3}',
    }  # fmt: skip
    page.evaluate("all => Object.entries(all).forEach(e => localStorage.setItem(...e))", damaged)
    page.reload()
    expect(ask(page)).to_have_text("ok")
    page.reload()
    expect(page.locator("#chats li")).to_have_count(1)
    expect(page.locator(".failure")).to_have_count(0)
    kept = page.evaluate("key => localStorage.getItem(key)", "qwen-ds.chat.a")
    assert kept == damaged["qwen-ds.chat.a"]


def test_a_full_store_is_told(page: Page, scripted: ScriptedPage) -> None:
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); } }")
    expect(ask(page)).to_have_text("ok")
    expect(page.locator("#notice")).to_contain_text("no room")


def test_an_answer_is_finished_in_a_chat_that_is_not_open(
    page: Page, scripted: ScriptedPage
) -> None:
    gate = Gate()
    scripted.script = saying("begun", gate, " and ended")
    expect(ask(page)).to_have_text("begun")
    page.click("#new")
    expect(page.locator("#hello")).to_be_visible()
    scripted.script = saying("other")
    expect(ask(page, "meanwhile")).to_have_text("other")
    gate.open()
    page.locator("#chats .title").last.click()
    expect(page.locator(".text")).to_have_text("begun and ended")


def test_a_phone_has_nothing_beyond_its_width(scripted: ScriptedPage, opened: Open) -> None:
    page = opened(scripted.url, width=360, height=740)
    scripted.models = ["a-model-with-quite-a-long-name-that-fits-nowhere" * 2, "tuned"]
    page.reload()
    wide = "w" * 400
    scripted.script = saying(
        f"{wide}\n\n```\n{wide}\n```\n\n| {'cell | ' * 30}\n| {'--- | ' * 30}\n\n`{wide}` https://a.test/{wide}"
    )
    inside = "document.documentElement.scrollWidth <= 360 && " + " && ".join(
        f"document.querySelector('{name}').scrollWidth <= 360" for name in ("body", "main", "#log")
    )
    for language in ("en", "zh"):
        page.evaluate(f"applyLanguage('{language}')")
        for _ in range(2):  # one model, two models
            ask(page, wide)
            expect(page.locator("#send")).to_be_visible()
            assert page.evaluate(inside), language
            page.click("#compare")
        # What is wider is moved within its own box.
        for place in (".text pre", ".text .wide"):
            moved = f"document.querySelector('{place}').scrollLeft = 50"
            page.evaluate(moved)
            assert page.evaluate(f"document.querySelector('{place}').scrollLeft") == 50, place
        for opener in ("#menu", "#open-settings"):
            page.click(opener)
            assert page.evaluate(inside), (language, opener)
            page.keyboard.press("Escape")
    box = page.locator("#ask").bounding_box()
    assert box and box["y"] + box["height"] <= 740


def test_everything_that_can_be_used_has_a_name(page: Page, scripted: ScriptedPage) -> None:
    expect(ask(page)).to_have_text("ok")
    page.click("#open-settings")
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea')].filter(one =>
            !one.textContent.trim() && !one.ariaLabel && !one.labels?.length).map(one => one.id)"""
    )
    assert unnamed == []
    expect(page.locator("#close-settings")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#status")).to_have_text("Answer: ok")


def test_dark_follows_the_system(page: Page, scripted: ScriptedPage) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        script = "getComputedStyle(document.body).backgroundColor"
        colours.append(page.evaluate(script))
    assert colours == ["rgb(251, 250, 248)", "rgb(25, 24, 23)"]
