"""Sound rows that look like a defect, each beside the defect that it looks like."""

from __future__ import annotations

import pytest

from tests.data.doctor.test_detectors import spans


def kinds(question: str, answer: str) -> set[str]:
    return {span.kind for span in spans(question, answer)}


@pytest.mark.parametrize("char", "裡裏跡週麵髮鬆鬥牆產總視")
def test_a_traditional_character_among_simplified_ones_is_found(char: str) -> None:
    (found,) = spans("请介绍一下这里的风景。", f"这边的湖{char}很漂亮，适合春天来。")
    assert (found.kind, found.start) == ("traditional-among-simplified", 4)


@pytest.mark.parametrize("char", "著乾藉徵瞭堃喆昇")
def test_a_character_of_both_scripts_is_no_finding(char: str) -> None:
    assert kinds("请介绍一下这个人的名字。", f"他叫王{char}，这是一个常见的名字。") == set()
