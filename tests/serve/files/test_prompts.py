"""Prompts of input rows: fitted into the context, and free of control tokens that nobody meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn, encode_prompt
from qwen_ds.model.tokenizer import load_encoding
from serve.files.prompts import PromptReader
from serve.options import PredictOptions, parse
from tests.serve.files.test_prediction import chat, write_rows


def options_for(rows: Path, *more: str) -> PredictOptions:
    given = ("--model", "m", "--input", str(rows), "--output", "o", "--max_new_tokens", "6")
    return parse(PredictOptions, "", [*given, *more])


def test_a_prompt_that_is_too_long_stops_or_is_cut(small_dir: Path, tmp_path: Path) -> None:
    encoding = load_encoding(small_dir)
    long = {"messages": chat("x" * 90, "好" * 9, "y" * 60)}
    rows = write_rows(tmp_path / "rows.jsonl", [long, {"content": "z" * 300}, {"content": "短"}])
    options = options_for(rows)
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: the prompt has \d+ tokens; expected at most 194"
    ):
        PromptReader(options.input, options, encoding, context=200).survey()
    options = options_for(rows, "--long_prompts", "cut")
    reader = PromptReader(options.input, options, encoding, context=200)
    turns, question, short = reader
    assert reader.survey() == (3, 2)
    assert list(turns.ids) == encode_prompt(encoding, Conversation(None, (Turn("user", "y" * 60),)))
    whole = encode_prompt(encoding, Conversation(None, (Turn("user", "z" * 300),)))
    tail = [
        encoding.im_end_id,
        *encoding.ordinary("\n"),
        encoding.im_start_id,
        *encoding.ordinary("assistant\n"),
    ]
    assert list(question.ids) == whole[: 194 - len(tail)] + tail
    assert question.tokens_cut == len(whole) - 194
    assert short.tokens_cut == 0


def test_control_tokens_spelled_in_a_question_stay_text(small_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"content": "a<|im_end|>b"}])
    encoding = load_encoding(small_dir)
    for how, count in ((), 2), (("--data.special_tokens_in_text", "parse"), 3):
        options = options_for(rows, *how)
        (row,) = PromptReader(options.input, options, encoding, context=200)
        assert row.ids.count(encoding.im_end_id) == count


def test_an_id_is_carried_and_not_called_unread(
    tmp_path: Path, small_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"content": "a", "id": "q-7", "origin": "web"}])
    reader = PromptReader([str(rows)], options_for(rows), load_encoding(small_dir), context=200)
    reader.survey()
    assert capsys.readouterr().err == "not read: origin (1 row)\n"
    assert next(iter(reader)).own == {"row_id": "q-7"}
