"""The page of a run in a browser, wide and narrow, with markup in every field of its data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from qwen_ds.report import one_run, several_runs
from qwen_ds.report.folder import read_run
from tests.browser.conftest import WAIT_SECONDS
from tests.report.runs import make_evaluation, make_whole_run

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)>"
    "</title></style></details><iframe src=https://evil.test></iframe>\"'`${alert(4)}"
)
SIZES = {"wide": (1280, 800), "phone": (390, 844)}
# Letters of a font that lacks them are drawn as boxes of one and the same picture.
BOXES = """letters => {
  const canvas = document.createElement('canvas'); canvas.width = canvas.height = 40;
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.font = '28px ' + getComputedStyle(document.body).fontFamily;
  const drawn = letter => {
    context.clearRect(0, 0, 40, 40); context.fillText(letter, 4, 32);
    return context.getImageData(0, 0, 40, 40).data.join();
  };
  const box = drawn('\\u{10FFFF}');
  return [...letters].filter(letter => letter.trim() && drawn(letter) === box);
}"""
TOO_WIDE = """() => [...document.querySelectorAll('main *')]
  .filter(it => !it.closest('.scroll, pre, svg'))
  .filter(it => it.getBoundingClientRect().right > innerWidth + 1)
  .map(it => it.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module", params=["one", "several"])
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it and markup in every field."""
    place = tmp_path_factory.mktemp("runs")
    folders = [make_whole_run(place / name, steps=300, text=HOSTILE) for name in ("甲", "乙")]
    make_evaluation(folders[1] / "eval_after", [0.5] * 40, "m", "x/adapter", HOSTILE, by="乙")
    runs = [read_run(folder) for folder in folders]
    page = place / "page.html"
    if request.param == "one":
        one_run.write_page(runs[0], page)
    else:
        several_runs.write_page(runs, page)
    return page


@pytest.fixture(params=SIZES)
def shown(request: pytest.FixtureRequest, browser: Browser, page_file: Path) -> Iterator[Page]:
    """The page; afterwards: nothing in it has asked for anything, run, or failed."""
    width, height = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(WAIT_SECONDS * 1000)
    page, asked, faults = context.new_page(), list[str](), list[Any]()
    page.on("request", lambda it: asked.append(it.url))
    page.on("dialog", lambda it: (faults.append(it.message), it.dismiss()))
    page.on("pageerror", lambda it: faults.append(str(it)))
    page.on("console", lambda it: faults.append(it.text))
    page.goto(page_file.as_uri())
    for details in page.locator("details").all():
        details.evaluate("it => { it.open = true }")
    yield page
    context.close()
    assert asked == [page_file.as_uri()] and not faults


def test_no_text_becomes_an_element_and_none_runs(shown: Page) -> None:
    assert shown.locator("script, img, iframe, object, embed, link, form").count() == 0
    on = "[...document.querySelectorAll('*')].flatMap(it => [...it.attributes])"
    assert shown.evaluate(f"() => {on}.filter(it => it.name.startsWith('on')).length") == 0
    assert shown.locator("body").inner_text().count("<script>alert(1)</script>") > 20


def test_every_letter_has_a_picture(shown: Page) -> None:
    letters = "".join(sorted({*shown.locator("body").inner_text()}))
    assert "锟" in letters or "答" in letters
    if shown.evaluate(BOXES, "中"):
        pytest.fail("no Chinese font here; apt-get install fonts-wqy-zenhei", pytrace=False)
    assert shown.evaluate(BOXES, letters) == []
    assert shown.evaluate(BOXES, "a\u0378b") == ["\u0378"]  # the check sees a box


def test_nothing_is_wider_than_the_screen(shown: Page) -> None:
    assert shown.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert shown.evaluate(TOO_WIDE) == []


def test_charts_have_text_in_the_colours_of_the_page(shown: Page) -> None:
    texts = shown.locator("figure svg text")
    assert texts.count() > 20 and shown.locator("figure svg path").count() > 6
    for scheme, dark in (("light", False), ("dark", True)):
        shown.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        colour = texts.first.evaluate("it => getComputedStyle(it).fill")
        red = int(colour.removeprefix("rgb(").split(",")[0])
        assert (red > 128) == dark, (scheme, colour)
