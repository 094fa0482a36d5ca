"""The chat page in a browser: how answers come, end and fail."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

from tests.browser.asking import ask, texts
from tests.browser.conftest import Open
from tests.browser.scripted import (
    WAIT_SECONDS,
    Answer,
    Body,
    Gate,
    Refusal,
    ScriptedPage,
    event_of,
    saying,
)


def test_an_answer_appears_in_pieces(page: Page, scripted: ScriptedPage) -> None:
    gates = [Gate(), Gate()]
    scripted.script = saying("one", gates[0], " two", gates[1], " three")
    answer = ask(page)
    expect(answer).to_have_text("one")
    gates[0].open()
    expect(answer).to_have_text("one two")
    expect(page.locator("#stop")).to_be_visible()
    gates[1].open()
    expect(answer).to_have_text("one two three")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".figures")).to_contain_text("3 tokens")
    expect(page.locator(".figures")).to_contain_text("tokens/s")
    expect(page.locator(".figures")).to_contain_text("first after")


def test_letters_whose_bytes_come_apart_arrive_whole(page: Page, scripted: ScriptedPage) -> None:
    gate, event = Gate(), event_of("话")
    middle = event.index("话".encode()) + 1
    scripted.script = saying(event_of("对") + event[:middle], gate, event[middle:])
    answer = ask(page)
    expect(answer).to_have_text("对")  # and so the half letter has come, too
    gate.open()
    expect(answer).to_have_text("对话")


def test_stop_ends_the_request_and_keeps_what_came(page: Page, scripted: ScriptedPage) -> None:
    scripted.script = saying("begun", Gate())
    expect(ask(page)).to_have_text("begun")
    page.click("#stop")
    expect(page.locator(".figures")).to_contain_text("stopped")
    assert scripted.left.wait(WAIT_SECONDS)
    scripted.script = saying("again")
    expect(ask(page, "more")).to_have_text("again")
    assert texts(scripted.bodies[-1]) == ["hello", "begun", "more"]


def test_retry_asks_the_same_again(page: Page, scripted: ScriptedPage) -> None:
    scripted.script = saying("first")
    expect(ask(page, "why?")).to_have_text("first")
    scripted.script = saying("second")
    page.locator(".question").get_by_role("button", name="Retry").click()
    expect(page.locator(".text")).to_have_text("second")
    first, second = scripted.bodies
    assert first == second and texts(first) == ["why?"]


def test_a_retry_that_fails_leaves_the_answer_that_was_there(
    page: Page, scripted: ScriptedPage
) -> None:
    scripted.script = saying("first")
    expect(ask(page, "why?")).to_have_text("first")
    scripted.script = lambda _: Refusal(503, "too many")
    for _ in range(2):
        page.locator(".question").get_by_role("button", name="Retry").click()
        expect(failed(page)).to_contain_text("The server is busy")
        expect(page.locator(".text")).to_have_text("first")
    page.reload()
    page.locator("#chats .title").click()
    expect(page.locator(".text")).to_have_text("first")
    scripted.script = saying("second")
    failed(page).get_by_role("button", name="Retry").click()
    expect(page.locator(".text")).to_have_text("second")
    expect(failed(page)).to_have_count(0)


def test_a_question_is_edited_and_asked_again(page: Page, scripted: ScriptedPage) -> None:
    expect(ask(page, "colour?")).to_have_text("ok")
    page.get_by_role("button", name="Edit").click()
    page.locator(".editing textarea").fill("which colour?")
    page.press(".editing textarea", "Enter")
    expect(page.locator(".said")).to_have_text("which colour?")
    expect(page.locator(".text")).to_have_text("ok")
    assert [texts(body) for body in scripted.bodies] == [["colour?"], ["which colour?"]]


def test_editing_an_earlier_question_leaves_the_old_chat_as_it_was(
    page: Page, scripted: ScriptedPage
) -> None:
    for question in ("one", "two", "three"):
        expect(ask(page, question)).to_have_text("ok")
    page.get_by_role("button", name="Edit").nth(1).click()
    page.locator(".editing textarea").fill("deux")
    page.locator(".editing").get_by_role("button", name="Send").click()
    expect(page.locator(".said")).to_have_text(["one", "deux"])
    expect(page.locator("#chats li")).to_have_count(2)
    page.locator("#chats li:not(.open) .title").click()
    expect(page.locator(".said")).to_have_text(["one", "two", "three"])
    assert texts(scripted.bodies[-1]) == ["one", "ok", "deux"]


def test_two_models_answer_side_by_side(page: Page, scripted: ScriptedPage) -> None:
    gate = Gate()

    def script(body: Body) -> Answer:
        asked = texts(body)[-1]
        return Answer([f"{body['model']} on {asked}", *([gate] if body["model"] == "base" else [])])

    scripted.script = script
    page.click("#compare")
    answers = ask(page, "this")
    expect(answers).to_have_text(["base on this", "tuned on this"])
    expect(page.locator(".who")).to_have_text(["base", "tuned"])
    boxes = [answers.nth(i).bounding_box() for i in range(2)]
    assert boxes[0] and boxes[1] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    gate.open()
    expect(page.locator("#send")).to_be_visible()
    # Each goes on from its own answers.
    expect(ask(page, "that")).to_have_text(["base on that", "tuned on that"])
    asked = {body["model"]: texts(body) for body in scripted.bodies}
    assert asked["base"] == ["this", "base on this", "that"]
    assert asked["tuned"] == ["this", "tuned on this", "that"]


def test_a_link_opens_two_models_side_by_side(scripted: ScriptedPage, opened: Open) -> None:
    page = opened(f"{scripted.url}/?left=tuned&right=base")
    expect(page.locator("#right")).to_be_visible()
    expect(ask(page)).to_have_text(["ok", "ok"])
    assert [body["model"] for body in scripted.bodies] == ["tuned", "base"]


def test_sampling_and_system_prompt_go_with_the_request(page: Page, scripted: ScriptedPage) -> None:
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 33, "repetition_penalty": 1.1,
        "seed": 4,
    }  # fmt: skip
    for name, value in given.items():
        page.fill(f"#field-{name}", str(value))
    page.click("#close-settings")
    expect(ask(page)).to_have_text("ok")
    page.reload()  # they are kept
    expect(ask(page, "then")).to_have_text("ok")
    for body in scripted.bodies:
        assert {name: body[name] for name in given} == given
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("#open-settings")
    page.fill("#field-top_k", "")
    page.click("#close-settings")
    expect(ask(page, "last")).to_have_text("ok")
    assert "top_k" not in scripted.bodies[-1]


def failed(page: Page) -> Locator:
    return page.locator(".turn .failure")


def test_a_full_server_is_one_line_with_a_retry(page: Page, scripted: ScriptedPage) -> None:
    scripted.script = lambda _: Refusal(503, "too many", headers={"retry-after": "3"})
    ask(page)
    expect(failed(page)).to_contain_text("The server is busy; it asks to wait 3 s.")
    scripted.script = saying("now")
    failed(page).get_by_role("button", name="Retry").click()
    expect(page.locator(".text")).to_have_text("now")
    expect(failed(page)).to_have_count(0)


def test_a_broken_stream_is_told_and_what_came_is_kept(page: Page, scripted: ScriptedPage) -> None:
    scripted.script = saying("half an", is_complete=False)
    answer = ask(page)
    expect(failed(page)).to_contain_text("broke off")
    expect(answer).to_have_text("half an")


def test_an_error_within_a_stream_is_told(page: Page, scripted: ScriptedPage) -> None:
    scripted.script = saying("half", {"error": {"message": "the engine has ended", "code": None}})
    ask(page)
    expect(failed(page)).to_contain_text("the engine has ended")


def test_a_chat_beyond_the_context_is_told(page: Page, scripted: ScriptedPage) -> None:
    message = "the prompt has 9000 tokens; expected at most 8191"
    scripted.script = lambda _: Refusal(400, message, "context_length_exceeded")
    ask(page)
    expect(failed(page)).to_contain_text("too long for the model")
    expect(failed(page)).to_contain_text(message)


def test_a_network_that_is_gone_is_told(page: Page, scripted: ScriptedPage) -> None:
    page.context.set_offline(True)
    ask(page)
    expect(failed(page)).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    failed(page).get_by_role("button", name="Retry").click()
    expect(page.locator(".text")).to_have_text("ok")


def test_one_side_that_fails_is_retried_alone(page: Page, scripted: ScriptedPage) -> None:
    scripted.script = lambda body: (
        Refusal(500, "lost") if body["model"] == "base" else Answer(["fine"])
    )
    page.click("#compare")
    ask(page)
    expect(failed(page)).to_have_count(1)
    scripted.script = saying("back")
    failed(page).get_by_role("button", name="Retry").click()
    expect(page.locator(".text")).to_have_text(["back", "fine"])
    assert len(scripted.bodies) == 3


def test_a_key_is_asked_for_and_sent(scripted: ScriptedPage, opened: Open) -> None:
    scripted.key = "secret"
    page = opened(scripted.url)
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    expect(page.locator("#key")).to_have_value("")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator("#left")).to_have_value("base")
    expect(ask(page)).to_have_text("ok")
    # In this tab alone, and in nothing that stays.
    assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
