"""The official vocabulary, `qwen.tiktoken`, through tiktoken.

Two faces of it. `Encoding` is the bare one for training: text to ids and back, cheap to hand to worker processes.
`QWenTokenizer` is the same for everything that speaks transformers. Both agree with the official tokenizer on every
id and every decoded text (tests/golden/tokenizer).
"""

from __future__ import annotations

import binascii
import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import tiktoken
from transformers import (
    AddedToken,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedConfig,
    PreTrainedTokenizer,
)

from qwen_ds.errors import UserError
from qwen_ds.model.chatml import CHAT_TEMPLATE, encode_turns, render_turns, turns_of

VOCABULARY_FILE = "qwen.tiktoken"
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# 208 of them; their ids follow the vocabulary's own.
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))

# Text is cut into these pieces first, the first alternative that fits wins, and no token reaches over a cut.
PIECES = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the blank or sign before it
        r"\p{N}",  # each digit by itself
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs, with the line breaks behind them
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # blanks, save the last one before a word
        r"\s+",
    )
)
# The engine behind tiktoken panics (not an Exception) on about a million blanks in a row, with a stack trace on
# stderr. A request or a data row must not take the process down, so such a text is refused beforehand.
LONGEST_BLANK = 900_000
_TOO_BLANK = re.compile(rf"\s{{{LONGEST_BLANK}}}")

Specials = Literal["all"] | Collection[str]


def _parse(vocabulary: bytes) -> dict[bytes, int]:
    """`base64-token rank` lines to a table; UserError unless the ranks are 0 .. n-1 and every byte has one."""
    fields = vocabulary.split()
    try:
        ranks = dict(
            zip(map(binascii.a2b_base64, fields[0::2]), map(int, fields[1::2]), strict=True)
        )
    except ValueError:  # binascii.Error is one
        raise UserError(f"{_bad_line(vocabulary)} is not a base64 token and its rank") from None
    n_ranks = len(fields) // 2
    if len(ranks) != n_ranks or sorted(ranks.values()) != list(range(n_ranks)):
        raise UserError(
            f"{n_ranks} tokens without the ranks 0 to {n_ranks - 1}, one each; is the file complete?"
        )
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError("not every single byte is a token; is the file complete?")
    return ranks


def _bad_line(vocabulary: bytes) -> str:
    for number, line in enumerate(vocabulary.splitlines(), 1):
        try:
            token, rank = line.split()
            binascii.a2b_base64(token)
            int(rank)
        except ValueError:
            return f"line {number}"
    return "the text"


class Encoding:
    """Text to token ids and back, without transformers. Build it with `load_encoding`; it never changes.

    Pickles as the vocabulary's bytes, so a worker process needs no file; inside one process the same vocabulary is
    built once (about 0.2 s).

    special: token text to id, the 208 of SPECIAL_TOKENS, which follow the vocabulary's ranks.
    n_vocab: ranks and specials together (151,851 for the official file; the embedding has some rows more).
    sha256: of the vocabulary file, in hex.
    """

    __slots__ = (
        "_bpe",
        "eod_id",
        "im_end_id",
        "im_start_id",
        "n_vocab",
        "ranks",
        "sha256",
        "special",
        "vocabulary",
    )

    def __init__(self, vocabulary: bytes) -> None:
        self.vocabulary = vocabulary
        self.sha256 = hashlib.sha256(vocabulary).hexdigest()
        self.ranks = _parse(vocabulary)
        self.special = {token: len(self.ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.n_vocab = len(self.ranks) + len(self.special)
        self.eod_id, self.im_start_id, self.im_end_id = (
            self.special[t] for t in (END_OF_TEXT, IM_START, IM_END)
        )
        self._bpe = tiktoken.Encoding(
            "qwen", pat_str=PIECES, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return encoding_of, (self.vocabulary,)

    def ordinary(self, text: str) -> list[int]:
        """Ids of the text in NFC; a control token spelled in it is text like any other."""
        return self._bpe.encode_ordinary(_normal(text))

    def with_specials(
        self, text: str, allowed_special: Specials = "all", disallowed_special: Specials = ()
    ) -> list[int]:
        """Ids of the text in NFC; those of `allowed_special` that it spells become control tokens.

        Raises ValueError where the text spells one of `disallowed_special` ("all": all that are not allowed).
        """
        allowed = allowed_special if allowed_special == "all" else set(allowed_special)
        return self._bpe.encode(
            _normal(text), allowed_special=allowed, disallowed_special=disallowed_special
        )

    def decode(self, ids: Sequence[int], errors: str = "replace") -> str:
        """Text of the ids, control tokens spelled out. `errors` is for bytes that are no whole UTF-8, as in
        bytes.decode. Raises KeyError for an id without a token (the embedding has rows beyond n_vocab)."""
        return self._bpe.decode(ids, errors=errors)

    def token(self, index: int) -> bytes | str:
        """A token as the official tokenizer shows it: bytes, or the text of a special. ValueError if there is none."""
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
    """The vocabulary with these bytes, built once. UserError if it is damaged."""
    return Encoding(vocabulary)


def load_encoding(path: str | Path) -> Encoding:
    """The vocabulary of a checkpoint folder, or of the file itself. UserError if it is missing or damaged."""
    path = Path(path)
    if path.is_dir():
        path = path / VOCABULARY_FILE
    try:
        vocabulary = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; expected the model's {VOCABULARY_FILE}"
        ) from None
    try:
        return encoding_of(vocabulary)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


class _NameOnly(PreTrainedConfig):
    """Stands in for a config in `register`; no file ever has this model_type."""

    model_type = "qwen-tokenizer"


def register() -> None:
    """Make AutoTokenizer use QWenTokenizer wherever a folder names it (`tokenizer_class`, in either of its configs).

    Only the name is registered, on purpose: next to a tokenizer that is registered for the config's class,
    transformers prefers the folder's own code wherever a caller allows remote code, and the official folders name such
    code. A name that leads to a class outside transformers comes before it.
    """
    AutoTokenizer.register(_NameOnly, QWenTokenizer, exist_ok=True)


class QWenTokenizer(PreTrainedTokenizer):
    """The official tokenizer's behaviour on transformers 5.

    `tok(text)` gives the official ids, in which control tokens spelled in the text are parsed;
    `tok(text, split_special_tokens=True)` never yields one. `allowed_special` and `disallowed_special` are tiktoken's.
    Unlike the official class it has a padding and an eos token from the start, both `<|endoftext|>`. The vocabulary
    cannot grow: adding a token that is not one of the 208 specials raises ValueError.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]

    def __init__(
        self, vocab_file: str | None = None, errors: str = "replace", **kwargs: Any
    ) -> None:
        if vocab_file is None:
            where = kwargs.get("name_or_path") or "the folder"
            raise UserError(
                f"{where} has no {VOCABULARY_FILE}; expected the model's vocabulary file there"
            )
        self._encoding = load_encoding(vocab_file)
        self.errors = errors
        for name in ("pad_token", "eos_token"):
            if kwargs.get(name) is None:
                kwargs[name] = END_OF_TEXT
        # A saved folder carries no code, so it must not name any. Its chat template is always ours (see below), and
        # tokens that somebody listed as added are in the vocabulary already, or refused.
        kwargs.pop("auto_map", None)
        kwargs.pop("chat_template", None)
        self._refuse_unknown(kwargs.pop("added_tokens_decoder", {}).values())
        super().__init__(errors=errors, chat_template=CHAT_TEMPLATE, **kwargs)

    @property
    def encoding(self) -> Encoding:
        """The bare encoding underneath."""
        return self._encoding

    @property
    def eod_id(self) -> int:
        return self._encoding.eod_id

    @property
    def im_start_id(self) -> int:
        return self._encoding.im_start_id

    @property
    def im_end_id(self) -> int:
        return self._encoding.im_end_id

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text to id of all 208 control tokens."""
        return self._encoding.special

    @property
    def mergeable_ranks(self) -> dict[bytes, int]:
        """Bytes to id of all other tokens."""
        return self._encoding.ranks

    @property
    def vocab_size(self) -> int:
        return self._encoding.n_vocab

    def __len__(self) -> int:
        return self._encoding.n_vocab

    def get_vocab(self) -> dict[Any, int]:
        """Token to id: bytes for ordinary tokens, text for the specials."""
        return {**self._encoding.ranks, **self._encoding.special}

    def _refuse_unknown(self, tokens: Iterable[str | AddedToken]) -> None:
        unknown = [str(token) for token in tokens if str(token) not in self._encoding.special]
        if unknown:
            raise ValueError(
                f"cannot add {', '.join(map(repr, unknown))}: Qwen's vocabulary is fixed"
            )

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        self._refuse_unknown(new_tokens or ())
        return 0

    def tokenize(  # type: ignore[override]  # tokens are bytes here, as in the official class
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        split_special_tokens: bool | None = None,
        allowed_special: Specials = "all",
        disallowed_special: Specials = (),
        **_: Any,
    ) -> list[bytes | str]:
        """The text's tokens: bytes, and text for the specials. Raises ValueError as `Encoding.with_specials` does."""
        if self.split_special_tokens if split_special_tokens is None else split_special_tokens:
            ids = self._encoding.ordinary(text)
        else:
            ids = self._encoding.with_specials(text, allowed_special, disallowed_special)
        return [self._encoding.token(index) for index in ids]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Id of a token (bytes, or a special's text), or ids of several; None for what is no token."""
        if isinstance(tokens, bytes):
            return self._encoding.ranks.get(tokens)
        if isinstance(tokens, str):
            return self._encoding.special.get(tokens)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or tokens of several. ValueError for an id without a token."""
        if isinstance(ids, int):
            return self._encoding.token(ids)
        return [
            self._encoding.token(int(i))
            for i in ids
            if not (skip_special_tokens and int(i) >= self.eod_id)
        ]

    def convert_tokens_to_string(self, tokens: Iterable[bytes | str]) -> str:
        """Text of the tokens. A special between two parts of a character keeps them apart."""
        parts: list[str] = []
        pending = b""
        for token in (*tokens, ""):
            if isinstance(token, bytes):
                pending += token
            else:
                parts += (pending.decode("utf-8", errors=self.errors), token)
                pending = b""
        return "".join(parts)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **_: Any,
    ) -> str:
        """Official decoding. With `skip_special_tokens` also ids without a token are left out; KeyError otherwise.
        Blanks are never cleaned up, whatever a folder's settings say: the official class does not either."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if skip_special_tokens:
            ids = [index for index in ids if index < self.eod_id]
        return self._encoding.decode(ids, errors=errors or self.errors)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        padding: Any = False,
        truncation: Any = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> Any:
        """Chat messages, or a batch of them, as ChatML; arguments and results as transformers has them.

        With `tokenize` no content can yield a control token, so `sanitize_control_tokens` is always on. There is no
        other template than ChatML: a `chat_template`, tools, documents or an assistant mask raise ValueError.
        A chat without a system message gets DEFAULT_SYSTEM. UserError names a message that is none.
        """
        if chat_template is not None or tools or documents or return_assistant_tokens_mask:
            raise ValueError(
                "Qwen's ChatML has no other chat_template, no tools, no documents, no assistant mask"
            )
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt starts a message and continue_final_message goes on with one"
            )
        # As transformers does: a batch is a list of chats, a chat a list of messages.
        is_batch = len(conversation) > 0 and isinstance(conversation[0], list | tuple)
        chats = [turns_of(chat) for chat in (conversation if is_batch else [conversation])]
        ending = (add_generation_prompt, bool(continue_final_message))
        if not tokenize:
            texts = [render_turns(turns, *ending) for turns in chats]
            return texts if is_batch else texts[0]
        ids = [encode_turns(self._encoding, turns, *ending) for turns in chats]
        encoded: BatchEncoding = self(
            ids if is_batch else ids[0],
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        return encoded if return_dict else encoded["input_ids"]

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the vocabulary, byte for byte what was loaded."""
        name = f"{filename_prefix}-{VOCABULARY_FILE}" if filename_prefix else VOCABULARY_FILE
        path = Path(save_directory) / name
        path.write_bytes(self._encoding.vocabulary)
        return (str(path),)
