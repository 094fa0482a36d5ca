"""`qwen.tiktoken` as the files of a Qwen2 tokenizer, and back.

tiktoken joins the pair of neighbours whose union has the lowest rank; the `tokenizers` library
wants the list of pairs that may be joined, best first. A token's last join is the one that tiktoken
makes when it encodes the token's own bytes with the lower ranks alone, so replaying that for every
token gives the list. The files write bytes as printable characters, in the alphabet of GPT-2.

The two agree on every text but one kind: `tokenizers` looks for the special tokens before it brings
the text to NFC, Qwen afterwards. Where U+0338, a stroke through the character before it, follows a
special token, NFC makes another character of the token's `>`, so that for Qwen there is no special
token; Qwen2's tokenizer finds it.
"""

from __future__ import annotations

import base64
import json
import os
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen_ds.disk.read import read_json
from qwen_ds.disk.write import replacing, write_json, write_text
from qwen_ds.errors import UserError
from qwen_ds.export.qwen2.settings import TOKENIZER_CONFIG
from qwen_ds.model.chatml import CHAT_TEMPLATE
from qwen_ds.model.tokenizer import (
    END_OF_TEXT,
    IM_END,
    PIECES,
    SPECIAL_TOKENS,
    VOCABULARY_FILE,
    Encoding,
    encoding_of,
)

TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"


_CHARACTERS: dict[int, str] = bytes_to_unicode()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def _spelled(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


@lru_cache(maxsize=2)
def merges_of(encoding: Encoding) -> list[tuple[bytes, bytes]]:
    """The pairs whose union is a token, in the order of its rank; 2 s for the official vocabulary.

    UserError for a token that no two lower ones make: such a vocabulary has no list of merges.
    """
    ranks, merges = encoding.ranks, []
    for token, rank in sorted(ranks.items(), key=itemgetter(1)):
        if len(token) > 1:
            parts = _joined(token, ranks, rank)
            if len(parts) != 2:
                raise UserError(
                    f"{VOCABULARY_FILE}: {token!r} (rank {rank}) is not made of two tokens of"
                    " lower rank; expected the ranks of byte pair encoding"
                )
            merges.append((parts[0], parts[1]))
    return merges


def _joined(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """The parts that tiktoken leaves of a token's bytes with the ranks below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        unions = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        best = min(unions)
        if best >= limit:
            break
        at = unions.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def write_qwen2_tokenizer(
    encoding: Encoding, folder: Path, *, chatml: bool, model_max_length: int
) -> None:
    """Write tokenizer.json, tokenizer_config.json (with the ChatML template), vocab and merges.

    In `chatml` a reply ends with <|im_end|>, the tokenizer's eos; else with <|endoftext|>.
    """
    ranks = sorted(encoding.ranks.items(), key=itemgetter(1))
    vocab = {_spelled(token): rank for token, rank in ranks}
    merges = [(_spelled(left), _spelled(right)) for left, right in merges_of(encoding)]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    with replacing(folder / TOKENIZER) as unfinished:
        tokenizer.save(str(unfinished))
    write_json(folder / TOKENIZER_CONFIG, _tokenizer_config(encoding, chatml, model_max_length))
    write_text(folder / VOCAB, json.dumps(vocab, ensure_ascii=False, separators=(",", ":")))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    write_text(folder / MERGES, "\n".join(lines) + "\n")


def _tokenizer_config(encoding: Encoding, chatml: bool, model_max_length: int) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    flags["special"] = True
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {"content": token, **flags} for token, index in encoding.special.items()
        },
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END if chatml else END_OF_TEXT,
        "errors": "replace",
        "model_max_length": model_max_length,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def read_qwen2_tokenizer(folder: Path) -> Encoding:
    """Read the vocabulary in a Qwen2 folder's tokenizer.json, as `qwen.tiktoken` has it.

    UserError unless it is byte-level BPE with ranks from 0 on, with the merges that its ranks give
    and special tokens that are Qwen's first ones.
    """
    path = folder / TOKENIZER
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; expected the tokenizer of a Qwen2")
    found = read_json(path)
    try:
        vocab: dict[str, int] = found["model"]["vocab"]
        merges = [
            tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
            for pair in found["model"]["merges"]
        ]
        special = {(token["content"], token["id"]) for token in found.get("added_tokens", ())}
        ranks = {
            bytes(_BYTES[c] for c in token): rank
            for token, rank in vocab.items()
            if (token, rank) not in special
        }
        if any(type(index) is not int for index in (*ranks.values(), *(id for _, id in special))):
            raise TypeError("an id is no whole number")
        known = sorted(special)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not byte-level BPE ({type(error).__name__}: {error}); expected a Qwen2's"
        ) from None
    lines = (
        base64.b64encode(token) + f" {rank}\n".encode()
        for token, rank in sorted(ranks.items(), key=itemgetter(1))
    )
    try:
        encoding = encoding_of(b"".join(lines))
        pairs = [(_spelled(left), _spelled(right)) for left, right in merges_of(encoding)]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if pairs != merges:
        raise UserError(
            f"{path}: its merges are not those that its ranks give; expected a tokenizer made from"
            " Qwen's"
        )
    for token, index in known:
        if encoding.special.get(token) != index:
            raise UserError(
                f"{path}: {token!r} has the id {index}; expected one of Qwen's special tokens"
                " under its id"
            )
    return encoding
