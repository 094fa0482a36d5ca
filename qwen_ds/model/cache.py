"""The prompt lengths that dynamic NTK needs, kept in the key-value cache they belong to.

Keys in a cache are already rotated, so the alpha that rotated them has to serve every later token of the row: it is
fixed by the length of the row's whole prompt, also when that prompt is prefilled in chunks. The length therefore
travels with the cache object, whichever class of transformers' that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache


@dataclass(slots=True)
class _Prompt:
    lens: int | Tensor  # int: no row is longer; int64 [B]: each row's own length
    started: bool  # False: declared, and no token has been cached since


def declare_prompt_lens(cache: Cache, lens: int | Tensor) -> None:
    """Say how long the prompts are that will be prefilled into this empty cache.

    Needed only where the first forward cannot know: a prompt prefilled in chunks, or right-padded rows run without an
    attention mask. Otherwise the model takes the lengths from the first forward.

    Args:
        lens: tokens of each row's prompt, int64 [B], or one int for all rows.
    """
    cache.qwen_prompt = _Prompt(lens, started=False)  # type: ignore[attr-defined]


def row_lens(mask_BT: Tensor | None, num_tokens: int, seq_length: int) -> int | Tensor:
    """True lengths of rows, int64 [B]; one int where that says enough: no mask, or no row can exceed seq_length.

    Args:
        mask_BT: [B, num_tokens], 1 for a real token; None: all are.
    """
    if mask_BT is None or num_tokens <= seq_length:
        return num_tokens
    return mask_BT.sum(-1, dtype=torch.int64)


def prompt_lens(
    cache: Cache, past_len: int | Tensor, lens: int | Tensor, num_rows: int
) -> int | Tensor:
    """The lengths that decide alpha: those fixed by the first forward on this cache; `lens` if this is the first.

    Args:
        past_len: tokens in the cache so far (static caches keep it as a tensor).
        lens: true lengths of the rows as of this forward, from `row_lens`.
        num_rows: B.

    Raises:
        ValueError: the rows in the cache are not the rows of this forward.
    """
    prompt: _Prompt | None = cache.__dict__.get(
        "qwen_prompt"
    )  # transformers' object: the attribute may be absent
    if prompt is None or (
        prompt.started and _is_empty(past_len)
    ):  # the second: the cache was reset
        prompt = _Prompt(lens, started=True)
        cache.qwen_prompt = prompt  # type: ignore[attr-defined]
    prompt.started = True
    if isinstance(prompt.lens, Tensor) and prompt.lens.shape[0] not in (1, num_rows):
        raise ValueError(
            f"the cache was filled with {prompt.lens.shape[0]} rows and is used with {num_rows}; expected the same "
            "rows (after changing them, call declare_prompt_lens)"
        )
    return prompt.lens


def _is_empty(past_len: int | Tensor) -> bool:
    if isinstance(past_len, Tensor) and torch.compiler.is_compiling():
        return False  # a compiled decoding step: reading the tensor would break the graph; resets are not compiled
    return int(past_len) == 0
