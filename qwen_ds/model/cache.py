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
    started: bool = False  # whether a token has been cached since


def declare_prompt_lens(cache: Cache, lens: int | Tensor) -> None:
    """Tell an empty cache the lengths of the prompts that will be prefilled into it: the same as
    `prompt_lens` of the model's forward, for callers that do not call it themselves."""
    cache.qwen_prompt = _Prompt(lens, declared=True)  # type: ignore[attr-defined]


def row_lens(mask_BT: Tensor | None, num_tokens: int, seq_length: int) -> int | Tensor:
    """True lengths of rows of num_tokens, int64 [B]; or one int, if there is no mask or no row can
    exceed seq_length. The mask is 1 for a real token; ValueError for a 4-D one, if a row can."""
    if mask_BT is None or num_tokens <= seq_length:
        return num_tokens
    if mask_BT.dim() != 2:
        # The longest row's alpha for all of them would be silently wrong: logits off by 12.
        raise ValueError(
            f"a {mask_BT.dim()}-D attention mask and {num_tokens} tokens, more than seq_length "
            f"{seq_length}; expected prompt_lens, the tokens of each row's prompt, which such a "
            "mask does not show"
        )
    return mask_BT.sum(-1, dtype=torch.int64)


def prompt_lens_of(
    cache: Cache | None,
    shape_BT: tuple[int, int],
    past_len: int | Tensor,
    attention_mask: Tensor | None,
    given: int | Tensor | None,
    seq_length: int,
) -> int | Tensor:
    """The lengths that decide alpha: those given, else the cache's, else the rows' in this forward.

    Args:
        shape_BT: rows and tokens of this forward.
        past_len: tokens in the cache (static caches keep it as a tensor).

    Raises:
        ValueError: lengths that matter cannot be known, those given are no lengths or not those of
            the first forward, or the cache holds another number of rows.
    """
    rows, length = shape_BT
    # An attribute of ours on an object of transformers, so it may be absent.
    prompt: _Prompt | None = None if cache is None else cache.__dict__.get("qwen_prompt")
    if prompt is not None and prompt.started and _is_empty(past_len):
        prompt = None  # the cache was reset
    if given is not None:
        first = prompt.lens if prompt is not None and prompt.started else None
        if given is not first:  # it is at every step of `generate`
            _check_given(given, rows, first)
        prompt = _Prompt(given, declared=True)
    elif prompt is None:
        # Not the number of keys, of which a static cache has more.
        inferred = row_lens(attention_mask, int(past_len) + length, seq_length)
        prompt = _Prompt(inferred, declared=False)
    elif not prompt.declared and length > 1 and int(past_len) + length > seq_length:
        raise ValueError(
            f"{length} tokens follow {int(past_len)} cached ones beyond seq_length {seq_length}; "
            "expected prompt_lens in the first forward: a prompt in chunks is rotated for its "
            "whole length"
        )
    prompt.started = True
    if cache is not None:
        cache.qwen_prompt = prompt  # type: ignore[attr-defined]
    if isinstance(prompt.lens, Tensor) and prompt.lens.numel() not in (1, rows):
        raise ValueError(
            f"the cache was filled with {prompt.lens.numel()} rows and is used with {rows}; "
            "expected the same rows, or prompt_lens of the rows there are now"
        )
    return prompt.lens


def _check_given(given: int | Tensor, rows: int, first: int | Tensor | None) -> None:
    """Compare lengths with what they can be, and with those that cached keys are rotated for."""
    lens = torch.as_tensor(given)
    is_integer = not (lens.is_floating_point() or lens.is_complex() or lens.dtype == torch.bool)
    if not is_integer or lens.numel() not in (1, rows) or bool((lens < 0).any()):
        raise ValueError(
            f"prompt_lens is {lens.tolist()}; expected the tokens of each row's prompt, an int or "
            f"int64 [{rows}]"
        )
    known = lens if first is None else torch.as_tensor(first, device=lens.device)
    # Another number of rows: the caller has selected some of them since.
    if known.numel() in (1, rows) and bool((known.flatten() != lens.flatten()).any()):
        raise ValueError(
            f"prompt_lens is {lens.tolist()}; expected {known.tolist()} as in the first forward, "
            "for which the cached keys are rotated"
        )


def _is_empty(past_len: int | Tensor) -> bool:
    # In a compiled decoding step, reading the tensor would break the graph; no reset is compiled.
    if isinstance(past_len, Tensor) and torch.compiler.is_compiling():
        return False
    return int(past_len) == 0
