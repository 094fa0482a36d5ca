"""The official tokenizer for everything that speaks transformers, on top of the bare `Encoding`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizer

from qwen_ds.disk.write import replacing
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import CHAT_TEMPLATE, encode_turns, render_turns, turns_of
from qwen_ds.model.tokenizer import END_OF_TEXT, VOCABULARY_FILE, Specials, load_encoding


class _NameOnly(PreTrainedConfig):
    """Stand-in for a config in `register`; no file ever has this model_type."""

    model_type = "qwen-tokenizer"


def register() -> None:
    """Make AutoTokenizer use QWenTokenizer where a folder's configs name it (`tokenizer_class`).

    Only the name is registered, on purpose. To a tokenizer registered for the config's class,
    transformers prefers the folder's own code where a caller allows remote code, and the official
    folders name such code. A name that leads to a class outside transformers wins over that code.
    """
    AutoTokenizer.register(_NameOnly, QWenTokenizer, exist_ok=True)


class QWenTokenizer(PreTrainedTokenizer):
    """The official tokenizer's behaviour on transformers 5.

    `tok(text)` gives the official ids, in which control tokens spelled in the text are parsed;
    `tok(text, split_special_tokens=True)` never yields one. `allowed_special` and
    `disallowed_special` are tiktoken's. Unlike the official class it has a padding and an eos token
    from the start, both END_OF_TEXT. The vocabulary cannot grow: adding a token that is not one of
    the 208 specials raises ValueError.
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
        self.encoding = load_encoding(vocab_file)
        self.errors = errors
        self.eod_id = self.encoding.eod_id
        self.im_start_id, self.im_end_id = self.encoding.im_start_id, self.encoding.im_end_id
        for name in ("pad_token", "eos_token"):
            if kwargs.get(name) is None:
                kwargs[name] = END_OF_TEXT
        # A saved folder has no code, so it must not name any. The chat template is always ours, and
        # tokens listed as added are in the vocabulary already, or refused.
        kwargs.pop("auto_map", None)
        kwargs.pop("chat_template", None)
        self._refuse_unknown(kwargs.pop("added_tokens_decoder", {}).values())
        super().__init__(errors=errors, chat_template=CHAT_TEMPLATE, **kwargs)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text to id of all 208 control tokens. An attribute would be pickled with each copy."""
        return self.encoding.special

    @property
    def mergeable_ranks(self) -> dict[bytes, int]:
        """Bytes to id of all other tokens."""
        return self.encoding.ranks

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    def __len__(self) -> int:
        return self.encoding.n_vocab

    def get_vocab(self) -> dict[Any, int]:
        """Token to id: bytes for ordinary tokens, text for the specials."""
        return {**self.encoding.ranks, **self.encoding.special}

    def _refuse_unknown(self, tokens: Iterable[str | AddedToken]) -> None:
        unknown = [str(token) for token in tokens if str(token) not in self.encoding.special]
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"cannot add {names}: Qwen's vocabulary is fixed")

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
        """Tokens of the text: bytes, or text for specials. Errors as `Encoding.with_specials`."""
        if self.split_special_tokens if split_special_tokens is None else split_special_tokens:
            ids = self.encoding.ordinary(text)
        else:
            ids = self.encoding.with_specials(text, allowed_special, disallowed_special)
        return [self.encoding.token(index) for index in ids]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Id of a token (bytes, or a special's text), or ids of several; None: unknown."""
        if isinstance(tokens, bytes):
            return self.encoding.ranks.get(tokens)
        if isinstance(tokens, str):
            return self.encoding.special.get(tokens)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or tokens of several. ValueError for an id without a token."""
        if isinstance(ids, int):
            return self.encoding.token(ids)
        kept = [int(i) for i in ids if not skip_special_tokens or int(i) < self.eod_id]
        return [self.encoding.token(i) for i in kept]

    def convert_tokens_to_string(self, tokens: Iterable[bytes | str]) -> str:
        """Text of the tokens. A special between two parts of a character keeps them apart."""
        parts, pending = list[str](), b""
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
        """Decode as the official class does: `skip_special_tokens` also skips ids without a token,
        a KeyError otherwise, and blanks are never cleaned up, whatever a folder's settings say."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if skip_special_tokens:
            ids = [index for index in ids if index < self.eod_id]
        return self.encoding.decode(ids, errors=errors or self.errors)

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
        """Chat messages, or a batch of them, as ChatML; arguments and results are transformers'.

        With `tokenize` no content can yield a control token: `sanitize_control_tokens` is always
        on. The text that `tokenize=False` gives is for people to read: `tok(text)` would take a
        control token that is spelled in a message for one. Ids come from `tokenize=True` alone.
        A chat without a system message gets DEFAULT_SYSTEM. ValueError if another template, tools,
        documents or an assistant mask is asked for; UserError for no message.
        """
        if chat_template is not None or tools or documents or return_assistant_tokens_mask:
            others = "no other chat_template, no tools, no documents, no assistant mask"
            raise ValueError(f"Qwen's ChatML has {others}")
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt starts a message and continue_final_message continues one"
            )
        # As in transformers, a batch is a list of chats, and a chat a list of messages.
        is_batch = len(conversation) > 0 and isinstance(conversation[0], list | tuple)
        chats = [turns_of(chat) for chat in (conversation if is_batch else [conversation])]
        ending = (add_generation_prompt, bool(continue_final_message))
        if not tokenize:
            texts = [render_turns(turns, *ending) for turns in chats]
            return texts if is_batch else texts[0]
        ids = [encode_turns(self.encoding, turns, *ending) for turns in chats]
        encoded = self(
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
        path = Path(save_directory, name)
        with replacing(path) as unfinished:
            unfinished.write_bytes(self.encoding.vocabulary)
        return (str(path),)
