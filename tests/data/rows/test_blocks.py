"""Blocks: rows without target tokens are dropped, runs of target tokens end with their row."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.data.rows import blocks
from qwen_ds.data.rows.blocks import encode_block
from qwen_ds.data.rows.encode import Encoded, EncodeOptions
from qwen_ds.model.chatml import IGNORE, Conversation, Turn
from qwen_ds.model.tokenizer import load_encoding


def test_a_text_that_is_no_whole_unicode_is_a_row_like_any_other(small_dir: Path) -> None:
    talk = Conversation(None, (Turn("user", "a\ud800"), Turn("assistant", "b")))
    assert len(encode_block(load_encoding(small_dir), [talk], EncodeOptions()).length_K) == 1


def test_rows_without_anything_to_learn_are_dropped(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter(
        [
            Encoded([5, 6, 7], [IGNORE, 6, IGNORE]),
            Encoded([5, 6], [5, IGNORE]),  # nothing predicts the first token
            Encoded([5, 6], [IGNORE, IGNORE]),
            Encoded([5], [5]),
            Encoded([], [], dropped="no answer"),
            Encoded([8, 9, 9, 9], [8, 9, IGNORE, 9]),
        ]
    )
    monkeypatch.setattr(blocks, "encode_row", lambda *_: next(made))
    talk = Conversation(None, (Turn("user", "q"), Turn("assistant", "a")))
    block = encode_block(load_encoding(small_dir), [talk] * 6, EncodeOptions())
    assert block.dropped == [
        (1, "nothing to learn"),
        (2, "nothing to learn"),
        (3, "fewer than 2 tokens"),
        (4, "no answer"),
    ]
    assert block.place_K.tolist() == [0, 5]
    assert block.ids_N.tolist() == [5, 6, 7, 8, 9, 9, 9]
    assert block.runs_R2.tolist() == [[1, 2], [0, 2], [3, 4]]
    assert block.n_runs_K.tolist() == [1, 2]
    assert block.learnt_K.tolist() == [1, 2]


def test_runs_of_learnt_tokens_end_with_their_row(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter([Encoded([1, 2], [IGNORE, 2]), Encoded([3, 4], [3, 4])])
    monkeypatch.setattr(blocks, "encode_row", lambda *_: next(made))
    talk = Conversation(None, (Turn("user", "q"), Turn("assistant", "a")))
    block = encode_block(load_encoding(small_dir), [talk] * 2, EncodeOptions())
    assert block.runs_R2.tolist() == [[1, 2], [0, 2]]
    assert block.learnt_K.tolist() == [1, 1]
