"""Words by jieba, and characters."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import jieba
import pytest

from serve.scores import segmentation
from serve.scores.segmentation import Words, characters
from tests.serve.scores.pairs import text_pairs


def test_words_are_those_of_jieba_and_hold_the_whole_text() -> None:
    words = Words()
    for text, _ in text_pairs(60, seed=5):
        assert list(words.of(text)) == jieba.lcut(text)
        assert "".join(words.of(text)) == text


def test_a_text_is_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = []
    segmenter = segmentation._segmenter()
    monkeypatch.setattr(segmenter, "cut", lambda text: cut.append(text) or iter([text]))
    words = Words()
    assert words.of("裙子") == words.of("裙子") == ("裙子",)
    assert words.alphanumeric("裙子") == ["裙子"]
    assert cut == ["裙子"]


def test_characters_are_han_characters_and_whole_other_words() -> None:
    assert characters("这款T恤3.5厘米, it's a_b 𠀀𠀁㐀！") == (
        "这 款 t 恤 3 5 厘 米 it s a b 𠀀 𠀁 㐀".split()
    )


def test_segmenting_says_nothing_and_leaves_no_file(tmp_path: Path) -> None:
    code = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\n"
    code += "from serve.scores.segmentation import Words; print(Words().of('简约大方'))"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "('简约', '大方')"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
    assert tempfile.gettempdir() != str(tmp_path)
