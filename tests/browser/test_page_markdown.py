"""The chat page in a browser: texts become elements, and never markup."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.asking import ask
from tests.browser.scripted import Gate, ScriptedPage, saying

HOSTILE = [
    "<img src=x onerror=\"document.title='run'\">",
    "<script>document.title='run'</script>",
    "</div><style>*{display:none}</style><svg onload=\"document.title='run'\">",
    "[x](javascript:document.title='run')",
    "[x](JaVaScRiPt:alert(1)) [y](data:text/html,<script>alert(1)</script>) [z](//evil.test/x)",
    "![x](http://127.0.0.1:9/x.png)",
    "`<img src=x onerror=alert(1)>` **<b onclick=alert(1)>bold</b>**",
    "```<img src=x onerror=alert(1)>\n<img src=x onerror=alert(1)>\n",
    "| <img src=x onerror=alert(1)> | b |\n|---|---|\n| <iframe src=/> | &lt;i&gt; |",
    "# <img src=x onerror=alert(1)>\n> <img src=x onerror=alert(1)>\n- <b>x</b>",
    'https://a.test/"onmouseover=alert(1)//',
]
LIVE = "img, script, style, svg, iframe, object, b, i, [onerror], [onclick], [onmouseover], [style]"


def test_markup_in_an_answer_stays_text(page: Page, scripted: ScriptedPage) -> None:
    for text in HOSTILE:
        scripted.script = saying(*text)  # a letter at a time: every beginning of it is shown, too
        answer = ask(page, text)
        expect(page.locator(".figures").last).to_contain_text("tokens")
        for place in (answer, page.locator(".said").last, page.locator("#chats")):
            assert place.locator(LIVE).count() == 0, text
        for link in answer.locator("a").all():
            assert (link.get_attribute("href") or "").startswith(("http://", "https://")), text
            assert link.get_attribute("rel") == "noopener noreferrer"
        expect(page.locator(".said").last).to_have_text(text)
        assert page.title() == "Qwen-DS"


def test_the_names_of_models_and_errors_stay_text(page: Page, scripted: ScriptedPage) -> None:
    scripted.models = ["<img src=x onerror=alert(1)>"]
    scripted.script = saying({"error": {"message": "<img src=x onerror=alert(1)>"}})
    page.reload()
    page.wait_for_selector("#left option", state="attached")
    ask(page)
    expect(page.locator(".failure")).to_contain_text("<img src=x")
    assert page.locator("main img").count() == 0


# Text, and the elements that it becomes, as HTML.
SHAPES = {
    "a **b** *c* `d` ~~e~~": "<p>a <strong>b</strong> <em>c</em> <code>d</code> <del>e</del></p>",
    "***a***, __b__ _c_": "<p><strong><em>a</em></strong>, <strong>b</strong> <em>c</em></p>",
    "snake_case_name 2*3*4 a * b": "<p>snake_case_name 2<em>3</em>4 a * b</p>",
    "**half": "<p>**half</p>",
    "`half *a*": "<p>`half <em>a</em></p>",
    r"\*a\* \`b\`": "<p>*a* `b`</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# A #\n### B": "<h3>A</h3><h5>B</h5>",
    "- a\n- b\n  - c\n\n1. d": (
        '<ul><li>a</li><li><p>b</p><ul><li>c</li></ul></li></ul><ol start="1"><li>d</li></ol>'
    ),
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "> a\n> - b": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>",
    "***": "<hr>",
    "**加粗**，很好": "<p><strong>加粗</strong>，很好</p>",
}


DRAW = "text => { const it = el('div'); showMarkdown(it, text); return it; }"


def test_text_becomes_its_elements(page: Page) -> None:
    drawn = {text: page.evaluate(f"text => ({DRAW})(text).innerHTML", text) for text in SHAPES}
    assert drawn == SHAPES


def test_a_table_has_its_cells(page: Page, scripted: ScriptedPage) -> None:
    scripted.script = saying("| a | b\\|c |\n|:--|--:|\n| `d` | **e** |\n\nafter")
    answer = ask(page)
    expect(answer.locator("th")).to_have_text(["a", "b|c"])
    expect(answer.locator("td")).to_have_text(["d", "e"])
    expect(answer.locator("td strong, td code")).to_have_count(2)
    expect(answer.locator("p")).to_have_text("after")


def test_code_whose_fence_is_half_open_is_code_already(page: Page, scripted: ScriptedPage) -> None:
    gate = Gate()
    scripted.script = saying("See\n```py", "thon\nx = '<b>'\n# no heading", gate, "\n```\nafter")
    answer = ask(page)
    code = answer.locator("pre code")
    expect(code).to_have_text("x = '<b>'\n# no heading")
    expect(answer.locator("figcaption")).to_contain_text("python")
    expect(answer.locator("h3")).to_have_count(0)
    gate.open()
    expect(answer.locator("p")).to_have_text(["See", "after"])
    expect(code).to_have_text("x = '<b>'\n# no heading")


def test_blocks_that_are_complete_stay_as_the_answer_grows(
    page: Page, scripted: ScriptedPage
) -> None:
    gate = Gate()
    scripted.script = saying("first\n\nsec", gate, "ond")
    answer = ask(page)
    expect(answer.locator("p")).to_have_count(2)
    page.evaluate("document.querySelector('.text p').dataset.mark = 'kept'")
    gate.open()
    expect(answer.locator("p").last).to_have_text("second")
    expect(answer.locator("[data-mark=kept]")).to_have_text("first")


def test_texts_without_end_are_shown(page: Page) -> None:
    """Neither depth nor length of what a model repeats stops the page."""
    for piece in ("> ", "- ", "*", "**a ", "_", "[", "[a](", "`a``", "~~", "|", "1. ", "http://a "):
        text = piece * (60_000 // len(piece)) + "end"
        assert "end" in page.evaluate(f"text => ({DRAW})(text).textContent", text), piece
