"""The page of a data check on a phone."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser

from qwen_ds.data.doctor.page import page
from tests.data.doctor.test_page import summary

WIDER = "() => [...document.querySelectorAll('.scroll')].map(it => it.scrollWidth - it.clientWidth)"


def test_findings_and_examples_are_read_without_scrolling_sideways(
    browser: Browser, tmp_path: Path
) -> None:
    made = summary()
    (finding,) = made["findings"]
    finding["advice"] = "remove or replace phone numbers: models repeat what they have seen"
    finding["examples"][0]["before"] = "这里有一句相当长的话，它的后面才是号码：" * 3
    path = tmp_path / "report.html"
    path.write_text(page(made), encoding="utf-8")
    context = browser.new_context(viewport={"width": 390, "height": 844})
    shown = context.new_page()
    shown.goto(path.as_uri())
    findings, examples, *_ = shown.evaluate(WIDER)
    context.close()
    assert (findings, examples) == (0, 0)
