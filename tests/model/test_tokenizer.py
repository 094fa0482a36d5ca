"""The bare encoding: bytes of tokens, and the texts and vocabulary files that it refuses.

Its ids are held to the official ones in test_transformers_tokenizer, beside those of the class
around it.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.model.tokenizer import IM_END, LONGEST_BLANK, Encoding, load_encoding


@pytest.fixture(scope="module")
def enc(vocab_path: Path) -> Encoding:
    return load_encoding(vocab_path)


def test_the_bytes_of_tokens_add_up_to_their_text(enc: Encoding) -> None:
    ids = [*enc.ordinary("简约大方 dress"), enc.im_end_id]
    assert b"".join(map(enc.token_bytes, ids)).decode() == f"简约大方 dress{IM_END}"
    with pytest.raises(KeyError):
        enc.token_bytes(enc.n_vocab)


def test_a_worker_gets_the_vocabulary_and_not_its_path(enc: Encoding) -> None:
    assert pickle.loads(pickle.dumps(enc)) is enc  # built once a process


def test_a_million_blanks_are_refused_instead_of_a_panic(enc):
    assert len(enc.ordinary(" " * (LONGEST_BLANK - 1) + "x")) > 1000
    with pytest.raises(UserError, match="blanks in a row"):
        enc.ordinary("x" + "\t " * (LONGEST_BLANK // 2))
    with pytest.raises(UserError, match="blanks in a row"):
        enc.with_specials(" " * 2 * LONGEST_BLANK)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1].rsplit(b"\n", 1)[0] + b"\n", None),  # one merge less is fine
        (lambda data: b"", "complete"),
        (lambda data: data.replace(b"\n", b" one\n", 1), "line 1 "),
        (lambda data: data.splitlines(True)[0] + b"version https://git-lfs\n", "line 2 "),
        (lambda data: data.split(b"\n", 1)[1], "ranks 0 to"),
        (lambda data: b"".join(data.splitlines(True)[:255]), "single byte"),
    ],
)
def test_a_damaged_vocabulary_is_one_line(golden, tmp_path, damage, message):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(damage((golden / "small" / "mini.tiktoken").read_bytes()))
    if message is None:
        assert load_encoding(tmp_path).eod_id == 303
        return
    with pytest.raises(UserError, match=message) as caught:
        load_encoding(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
