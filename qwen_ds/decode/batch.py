"""Decoding of one static batch: prompts in, completions out, each row by its own parameters.

In fp32 a row's greedy answer is the one that it gets alone, token for token. In bf16 the last bit
of a logit depends on the shape of the matrix products, so a near tie may go the other way.

Shapes: B rows, T tokens of the longest prompt, S decoding steps, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen_ds.decode.exceptions import LogitsNotFinite, PromptTooLong
from qwen_ds.decode.padding import pad_left
from qwen_ds.decode.sampling import SamplingParams, draw, only_tokens, sampling_groups, uniforms
from qwen_ds.decode.stop import FinishReason, StopRule


class CausalModel(Protocol):
    """A causal language model with a key-value cache, called as transformers' models are."""

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Any,
        use_cache: bool,
        logits_to_keep: int,
    ) -> Any:
        """An object with `logits` [B, 1, V] of the last token, and the grown `past_key_values`."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The properties of a tokenizer that decoding needs."""

    size: int  # number of tokens; the head's rows beyond it are padding and are never chosen
    pad_id: int
    decode: Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class DecodingRow:
    """A prompt of at least one token, and how to answer it."""

    prompt: Sequence[int]
    sampling: SamplingParams
    stop: StopRule

    def require_room(self, context: int) -> None:
        """Raise PromptTooLong unless prompt and new tokens fit a context of so many tokens."""
        assert self.prompt, "a prompt has at least one token"
        room = context - self.sampling.max_new_tokens
        if len(self.prompt) > room:
            raise PromptTooLong(len(self.prompt), room)


@dataclass(frozen=True, slots=True)
class Completion:
    """One row's answer."""

    ids: tuple[int, ...]  # the new tokens, without the stop that ended them
    # Bytes that are no whole UTF-8 character show as U+FFFD: a cut answer may end inside one.
    text: str
    finish_reason: FinishReason
    prompt_tokens: int


@torch.no_grad()
def decode_steps(
    model: CausalModel,
    ids_BT: Tensor,
    mask_BT: Tensor,
    num_tokens: int,
    choose: Callable[[Tensor, int], Tensor],
    cache: Any = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """The next tokens ids_B, step by step and without end. Nothing is computed ahead of need.

    Args:
        ids_BT, mask_BT: the prompts, padded on the left.
        num_tokens: of the vocabulary; the head's rows beyond are never chosen.
        choose: from logits_BV (fp32, -inf where there is no token) and the number of the step,
            counted from 0, to ids_B.
        cache: a key-value cache that may hold the first columns already; None for a new one.
        use_cache: false runs the whole sequence at each step.

    Raises LogitsNotFinite at the first new token; checking later ones would cost a synchronisation
    each.
    """
    seen = 0 if cache is None else int(cache.get_seq_length())
    new_BT = ids_BT[:, seen:]
    for step in count():
        outputs = model(
            input_ids=new_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=use_cache,
            logits_to_keep=1,
        )  # fmt: skip
        logits_BV = only_tokens(outputs.logits[:, -1], num_tokens)
        if step == 0 and not bool(logits_BV.max(-1).values.isfinite().all()):
            raise LogitsNotFinite
        next_B = choose(logits_BV, step)
        yield next_B
        next_B1 = next_B.unsqueeze(1)
        cache = outputs.past_key_values
        new_BT = next_B1 if use_cache else torch.cat((new_BT, next_B1), dim=1)
        mask_BT = torch.cat((mask_BT, mask_BT.new_ones(next_B1.shape)), dim=1)


def decode_batch(
    model: CausalModel,
    rows: Sequence[DecodingRow],
    vocabulary: Vocabulary,
    device: torch.device,
    all_done: Callable[[bool], bool] = bool,
) -> list[Completion]:
    """Completions of the rows, in their order. A row that has ended stays in the batch.

    Args:
        all_done: called after each token with whether all rows here have ended; decoding ends when
            it returns true. Ranks that must make the same number of forward passes agree in it.

    Raises LogitsNotFinite, as `decode_steps` does.
    """
    ids_BT, mask_BT = pad_left([row.prompt for row in rows], vocabulary.pad_id, device)
    params = [row.sampling for row in rows]
    groups, uniform_BS = sampling_groups(params, device), uniforms(params, device)
    new: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)

    def choose(logits_BV: Tensor, step: int) -> Tensor:
        return draw(logits_BV, groups, uniform_BS[:, step])

    steps = decode_steps(model, ids_BT, mask_BT, vocabulary.size, choose)
    for next_B in islice(steps, uniform_BS.shape[1]):
        for i, token in enumerate(next_B.tolist()):
            if not ended[i]:
                new[i].append(token)
                ended[i] = (
                    len(new[i]) == rows[i].sampling.max_new_tokens
                    or rows[i].stop.length_of_stop(new[i]) > 0
                )
        if all_done(all(ended)):
            break
    found = []
    for row, ids in zip(rows, new, strict=True):
        kept, reason = row.stop.cut(ids)
        found.append(Completion(kept, vocabulary.decode(kept), reason, len(row.prompt)))
    return found
