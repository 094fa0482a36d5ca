"""Two ways to answer with transformers: `generate` in static batches, and its continuous batching.

Shapes: B rows of a batch, T prompt tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from qwen_ds.decode.request import Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.model.modeling import QWenLMHeadModel

Answers = list[list[int]]
Clock = Callable[[], float]

PAGE_TOKENS = 16
PROMPT_TOKENS = 256  # of prompts in one step, as in our engine by default


def generation_config(sampling: SamplingParams, **more: Any) -> GenerationConfig:
    """The same choice of tokens, by transformers; nothing ends an answer but its length."""
    if not sampling.do_sample:
        return GenerationConfig(do_sample=False, pad_token_id=0, **more)
    return GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p,
        top_k=sampling.top_k, pad_token_id=0, **more,
    )  # fmt: skip


def static_batches(
    model: QWenLMHeadModel, requests: Sequence[Request], slots: int, clock: Clock
) -> tuple[Answers, float]:
    """Answers by `generate`, and its seconds: left-padded batches in the order of arrival, each of
    which runs to its longest answer."""
    answers: Answers = []
    began = clock()
    for first in range(0, len(requests), slots):
        batch = requests[first : first + slots]
        longest = max(len(request.prompt) for request in batch)
        pads = [longest - len(request.prompt) for request in batch]
        ids_BT = [[0] * n + list(r.prompt) for n, r in zip(pads, batch, strict=True)]
        mask_BT = [[0] * n + [1] * (longest - n) for n in pads]
        counts = [request.sampling.max_new_tokens for request in batch]
        with torch.inference_mode():
            out_BT = model.generate(
                torch.tensor(ids_BT),
                attention_mask=torch.tensor(mask_BT),
                generation_config=generation_config(batch[0].sampling, max_new_tokens=max(counts)),
            )
        new = out_BT[:, longest:].tolist()
        answers += [row[:count] for row, count in zip(new, counts, strict=True)]
    return answers, clock() - began


def continuous_batching(
    model: QWenLMHeadModel, requests: Sequence[Request], slots: int, clock: Clock
) -> tuple[Answers, float]:
    """Answers by transformers' continuous batching, with pages enough for all slots; and its
    seconds, without those of its beginning and end.

    RuntimeError if a request fails, or its loop ends.
    """
    most = max(len(r.prompt) + r.sampling.max_new_tokens for r in requests)
    settings = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=slots * (most // PAGE_TOKENS + 2),
        max_batch_tokens=slots + PROMPT_TOKENS,
        max_requests_per_batch=slots,
        allow_block_sharing=False,  # no prompts begin alike
    )
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    sampling = requests[0].sampling
    manager = model.continuous_batching_context_manager(
        generation_config=generation_config(sampling, eos_token_id=-1, max_new_tokens=most),
        continuous_batching_config=settings,
    )
    answers: dict[str, list[int]] = {}
    with manager as running:
        began = clock()
        ids = [
            running.add_request(list(r.prompt), max_new_tokens=r.sampling.max_new_tokens)
            for r in requests
        ]
        while len(answers) < len(requests):
            result = running.get_result(timeout=1)
            if result is None and not running.is_running():
                raise RuntimeError("transformers' loop ended before its answers")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                answers[result.request_id] = result.generated_tokens
        seconds = clock() - began
    return [answers[name] for name in ids if name is not None], seconds
