"""Templates of pages: texts are shown and never obeyed, and a page asks nobody for anything."""

from __future__ import annotations

import re

import jinja2
import pytest

from qwen_ds.page.html import cut, duration, environment, figure, shown

PAGE = """{% extends "page.html.j2" %}
{% block title %}{{ name }}{% endblock %}
{% block content %}<p>{{ name }}</p>{% endblock %}"""


def rendered(name: object) -> str:
    return environment("qwen_ds.page").from_string(PAGE).render(name=name)


def test_markup_in_a_value_stays_text() -> None:
    page = rendered("</title><script>alert(1)</script>\"'")
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;") == 2


def test_characters_that_are_unseen_or_reorder_are_spelled() -> None:
    page = rendered("a\x00b\x1bc\u202ed\ud800e\ue000f\u0378g\u2028h\ufeffi\u200dj\nk")
    assert r"<p>a\x00b\x1bc\u202ed\ud800e\ue000f\u0378g\u2028h\ufeffi" + "\u200dj\nk</p>" in page
    page.encode()


def test_texts_in_other_scripts_and_numbers_pass() -> None:
    assert shown("你好，世界！é🙂") == "你好，世界！é🙂"
    assert "<p>7</p>" in rendered(7)


def test_a_name_that_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        environment("qwen_ds.page").from_string("{{ nothing }}").render()


def test_a_page_is_whole_and_asks_nobody() -> None:
    page = rendered("run")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert "Noto Sans CJK SC" in page
    assert not re.findall(r"https?:|@import|url\(|<link|<script|src=", page)


def test_a_long_text_is_cut_and_says_so() -> None:
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdefg", 3) == "abc… (4 more characters)"


def test_figures_have_four_digits_and_none_is_a_dash() -> None:
    assert [figure(v) for v in (1.23456, 12345, 0.00031, None, True, "x")] == [
        "1.235", "12,345", "0.00031", "–", "True", "x",
    ]  # fmt: skip


def test_times_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (12.4, 600, 7_500)] == ["12 s", "10 min", "2 h 05 min"]
