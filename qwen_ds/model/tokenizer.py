"""The official vocabulary, `qwen.tiktoken`, through tiktoken: text to ids and back, nothing else.

`Encoding` agrees with the official tokenizer on every id and every decoded text
(tests/golden/tokenizer). `QWenTokenizer` wraps it for transformers.
"""

from __future__ import annotations

import binascii
import hashlib
import re
import unicodedata
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import tiktoken

from qwen_ds.disk.read import read_bytes
from qwen_ds.errors import UserError

VOCABULARY_FILE = "qwen.tiktoken"
_MAX_BYTES = 16 * 2**20  # six times the official one's
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# 208 of them; their ids follow the vocabulary's own.
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))

# Text is first cut into these pieces, and no token spans a cut. The first alternative that fits
# wins.
PIECES = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the blank or sign before it
        r"\p{N}",  # each digit by itself
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs, with the line breaks after them
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # blanks, except the last one before a word
        r"\s+",
    )
)
# tiktoken's Rust engine panics (which no `except Exception` catches) on about a million blanks in a
# row. A request or a data row must not take the process down, so such a text is refused.
LONGEST_BLANK = 900_000
_TOO_BLANK = re.compile(rf"\s{{{LONGEST_BLANK}}}")

Specials = Literal["all"] | Collection[str]


def _parse(vocabulary: bytes) -> dict[bytes, int]:
    """Table of `base64-token rank` lines; UserError unless the ranks are 0 .. n-1 and every byte
    has one."""
    ranks: dict[bytes, int] = {}
    n_ranks = 0
    for number, line in enumerate(vocabulary.splitlines(), 1):
        if fields := line.split():
            try:
                token, rank = fields
                if not rank.isdigit():  # int() takes a sign, blanks and underscores
                    raise ValueError
                ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
            except ValueError:  # binascii.Error is one
                raise UserError(f"line {number} is not a base64 token and its rank") from None
            n_ranks += 1
    if sorted(ranks.values()) != list(range(n_ranks)):
        raise UserError(
            f"{n_ranks} tokens without the ranks 0 to {n_ranks - 1}, one each; is the file "
            "complete?"
        )
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError("not every single byte is a token; is the file complete?")
    return ranks


class Encoding:
    """Text to token ids and back, without transformers. `load_encoding` makes it; it never changes.

    It pickles as the vocabulary's bytes, so a worker process needs no file; inside one process the
    same vocabulary is built once (about 0.2 s). `ranks` are the ordinary tokens' ids, `special` the
    ids of SPECIAL_TOKENS, which follow; `n_vocab` counts both (151,851 in the official file; the
    embedding has more rows); `sha256` is the vocabulary file's, in hex.
    """

    __slots__ = (
        "_bpe", "eod_id", "im_end_id", "im_start_id", "n_vocab", "ranks", "sha256", "special",
        "vocabulary",
    )  # fmt: skip

    def __init__(self, vocabulary: bytes) -> None:
        self.vocabulary = vocabulary
        self.sha256 = hashlib.sha256(vocabulary).hexdigest()
        self.ranks = _parse(vocabulary)
        self.special = {token: len(self.ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.n_vocab = len(self.ranks) + len(self.special)
        # They come first among the specials.
        self.eod_id, self.im_start_id, self.im_end_id, *_ = self.special.values()
        self._bpe = tiktoken.Encoding(
            "qwen", pat_str=PIECES, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return encoding_of, (self.vocabulary,)

    def ordinary(self, text: str) -> list[int]:
        """Ids of the text in NFC; a control token spelled in it is ordinary text."""
        return self._bpe.encode_ordinary(_normal(text))

    def with_specials(
        self, text: str, allowed_special: Specials = "all", disallowed_special: Specials = ()
    ) -> list[int]:
        """Ids of the text in NFC; those of `allowed_special` that it spells become control tokens.
        ValueError if it spells one of `disallowed_special` ("all": all that are not allowed)."""
        allowed = allowed_special if allowed_special == "all" else set(allowed_special)
        return self._bpe.encode(
            _normal(text), allowed_special=allowed, disallowed_special=disallowed_special
        )

    def decode(self, ids: Sequence[int], errors: str = "replace") -> str:
        """Text of the ids, control tokens spelled out; `errors` as in bytes.decode. KeyError for an
        id without a token (the embedding has rows beyond n_vocab)."""
        return self._bpe.decode(ids, errors=errors)

    def token_bytes(self, index: int) -> bytes:
        """The bytes of a token; its text in UTF-8 for a special. KeyError for an id without one."""
        return self._bpe.decode_single_token_bytes(index)

    def token(self, index: int) -> bytes | str:
        """A token as the official tokenizer shows it: bytes, or the text of a special. ValueError
        for an id without one."""
        if 0 <= index < len(self.ranks):
            return self._bpe.decode_single_token_bytes(index)
        if len(self.ranks) <= index < self.n_vocab:
            return SPECIAL_TOKENS[index - len(self.ranks)]
        raise ValueError(f"id {index} has no token; expected 0 to {self.n_vocab - 1}")


def _normal(text: str) -> str:
    if len(text) >= LONGEST_BLANK and _TOO_BLANK.search(text):
        raise UserError(f"the text holds {LONGEST_BLANK:,} blanks in a row; expected fewer")
    return unicodedata.normalize("NFC", text)


@lru_cache(maxsize=4)
def encoding_of(vocabulary: bytes) -> Encoding:
    """The encoding of these vocabulary bytes, built once. UserError if they are damaged."""
    return Encoding(vocabulary)


def load_encoding(path: str | Path) -> Encoding:
    """The encoding of a checkpoint folder or a vocabulary file. UserError: missing or damaged."""
    path = Path(path)
    if path.is_dir():
        path = path / VOCABULARY_FILE
    vocabulary = read_bytes(path, _MAX_BYTES, f"the model's {VOCABULARY_FILE}")
    try:
        return encoding_of(vocabulary)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
