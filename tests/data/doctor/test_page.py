"""The page of a check shows what texts hold, and obeys none of it."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_ds.data.doctor.page import page

EVIL = "<script>alert(1)</script>"


def summary(severity: str = "warn", **more: Any) -> dict[str, Any]:
    example = {"place": f"{EVIL}:3", "before": EVIL, "marked": EVIL, "after": EVIL, "detail": EVIL}
    finding = {"finding": "phone", "severity": severity, "count": 2, "share": 0.02,
               "examples": [example], "advice": EVIL}  # fmt: skip
    shares = {"256": 0.5, "512": 0.25, "1024": 0.0, "2048": 0.0}
    return {
        "rows": 100, "rows_of_eval": 0, "rows_of_test_sets": 0, "files": {EVIL: 100},
        "not_trained_on": {EVIL: 1}, "not_read": {EVIL: {EVIL: 3}}, "tokens": "estimated",
        "cut_by_limit": {"data.max_tokens": {"value": 256, "rows": 50, "shares": shares}},
        "findings": [finding] if severity else [], **more,
    }  # fmt: skip


def test_texts_are_shown_and_not_obeyed() -> None:
    made = page(summary(kept=98, dropped=2))
    assert "<script" not in made and "&lt;script&gt;alert(1)&lt;/script&gt;" in made
    assert "<mark>&lt;script&gt;" in made and "http" not in made.split("</head>")[1]
    assert "50.0 %" in made and "25.0 %" in made


def test_a_joiner_that_is_the_finding_is_seen() -> None:
    made = summary()
    (finding,) = made["findings"]
    finding["finding"] = "zero-width-character"
    finding["examples"][0] |= {"before": "好", "marked": "\u200d", "after": "的"}
    assert r"好<mark>\u200d</mark>的" in page(made)


@pytest.mark.parametrize(
    ("severity", "words"),
    [("stop", "Do not train on this yet"), ("warn", "look at them before training"),
     ("note", "Nothing is wrong"), ("", "Nothing was found")],
)  # fmt: skip
def test_the_verdict_comes_first_and_in_words(severity: str, words: str) -> None:
    assert words in page(summary(severity)).split("<h2>")[0]
