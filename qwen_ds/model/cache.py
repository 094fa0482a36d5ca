"""The prompt lengths that dynamic NTK needs, kept in the key-value cache they belong to.

Keys in a cache are already rotated, so their alpha must serve every later token of the row: it is
fixed by the length of the row's whole prompt, also when that is prefilled in chunks. The length
therefore travels with the cache object, whichever of transformers' classes it has.

Shapes: B rows, T new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache


@dataclass(slots=True)
class _Prompt:
    lens: int | Tensor  # int: no row is longer; int64 [B]: each row's own length
    declared: bool  # False: inferred from the first forward, which may have been a first chunk
    started: bool  # False: no token has been cached since


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The size of one forward."""

    rows: int
    length: int
    past_len: int | Tensor
    """Tokens in the cache (static caches keep it as a tensor)."""

    @property
    def end(self) -> int:
        """Tokens in the cache afterwards; not its keys, of which a static cache has more."""
        return int(self.past_len) + self.length


def declare_prompt_lens(cache: Cache, lens: int | Tensor) -> None:
    """Tell an empty cache the lengths of the prompts that will be prefilled into it.

    The same as `prompt_lens` of the model's forward, for callers that do not call it themselves.

    Args:
        lens: tokens of each row's prompt, int64 [B], or one int for all rows.
    """
    cache.qwen_prompt = _Prompt(lens, declared=True, started=False)  # type: ignore[attr-defined]


def row_lens(mask_BT: Tensor | None, num_tokens: int, seq_length: int) -> int | Tensor:
    """True lengths of rows, int64 [B]; or one int, if there is no mask or no row can exceed
    seq_length.

    Args:
        mask_BT: [B, num_tokens], 1 for a real token; None: all are real.
    """
    if mask_BT is None or num_tokens <= seq_length:
        return num_tokens
    return mask_BT.sum(-1, dtype=torch.int64)


def prompt_lens_of(
    cache: Cache | None,
    new: NewTokens,
    attention_mask: Tensor | None,
    given: int | Tensor | None,
    seq_length: int,
) -> int | Tensor:
    """The lengths that decide alpha: those given, else the cache's, else the rows' in this forward.

    Raises:
        ValueError: lengths that matter cannot be known, or the cache holds another number of rows.
    """
    # An attribute of ours on an object of transformers, so it may be absent.
    prompt: _Prompt | None = None if cache is None else cache.__dict__.get("qwen_prompt")
    if given is not None:
        prompt = _Prompt(given, declared=True, started=True)
    elif prompt is None or (prompt.started and _is_empty(new.past_len)):  # new, or reset
        prompt = _Prompt(_inferred_lens(new, attention_mask, seq_length), False, started=True)
    elif not prompt.declared and new.length > 1 and new.end > seq_length:
        raise ValueError(
            f"{new.length} tokens follow {int(new.past_len)} cached ones beyond seq_length "
            f"{seq_length}; expected prompt_lens in the first forward: a prompt in chunks is "
            "rotated for its whole length"
        )
    prompt.started = True
    if cache is not None:
        cache.qwen_prompt = prompt  # type: ignore[attr-defined]
    if isinstance(prompt.lens, Tensor) and prompt.lens.shape[0] not in (1, new.rows):
        raise ValueError(
            f"the cache was filled with {prompt.lens.shape[0]} rows and is used with {new.rows}; "
            "expected the same rows, or prompt_lens of the rows there are now"
        )
    return prompt.lens


def _inferred_lens(new: NewTokens, attention_mask: Tensor | None, seq_length: int) -> int | Tensor:
    if attention_mask is None or attention_mask.dim() == 2:
        return row_lens(attention_mask, new.end, seq_length)
    if new.end > seq_length:
        # The longest row's alpha for all of them would be silently wrong: logits off by 12.
        raise ValueError(
            f"a 4-D attention mask and {new.end} tokens, more than seq_length {seq_length}; "
            "expected prompt_lens, the tokens of each row's prompt, which such a mask does not show"
        )
    return new.end


def _is_empty(past_len: int | Tensor) -> bool:
    if isinstance(past_len, Tensor) and torch.compiler.is_compiling():
        # Reading the tensor would break the graph of a compiled decoding step, and no reset is
        # compiled.
        return False
    return int(past_len) == 0
