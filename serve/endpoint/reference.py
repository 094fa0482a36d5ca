"""Loss of reference answers under a server's model, where the server tells it.

OpenAI's older /completions gives the prompt back with log-probabilities (echo). The prompt is
ChatML as text, in which the server must find the control tokens: vLLM and SGLang do. Its length in
tokens without the reference is known from the answer to the question.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qwen_ds.model.chatml import render_turns, turns_of
from qwen_ds.model.tokenizer import IM_END, IM_START
from serve.answering import Answer, Question

_TRIES = 3  # in vain, after which a server is not asked any more
_END = ("assistant", "\n")  # of the prompt, in tokens


class EndpointLosses:
    """The losses that one server tells, or does not."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told, self._failed = 0, 0

    def is_asked(self, question: Question, answer: Answer) -> bool:
        """Whether the loss of the question's reference is wanted, and may be had."""
        is_silent = not self._told and self._failed >= _TRIES
        is_wanted = question.reference is not None and not isinstance(question.asked, str)
        return is_wanted and answer.prompt_tokens is not None and not is_silent

    def body_of(self, question: Question, model: str) -> bytes:
        """The body of the request to /completions."""
        assert not isinstance(question.asked, str)
        prompt = render_turns(turns_of(question.asked), add_generation_prompt=True)
        asked = {"model": model, "prompt": f"{prompt}{question.reference}{IM_END}"}
        how = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, "stream": False}
        return json.dumps(asked | how).encode()

    def take(self, question: Question, answer: Answer, raw: bytes) -> Answer:
        """The answer with the loss that the body of a response tells, if it tells one."""
        found = _loss(raw, answer.prompt_tokens or 0)
        if found is None:
            self.fail("its /completions does not tell log-probabilities of a prompt in ChatML")
            return answer
        self._told += 1
        return replace(answer, reference_nll=found[0], reference_tokens=found[1])

    def fail(self, why: str) -> None:
        """Count a reference without a loss, and say it once."""
        if not self._failed:
            self._tell(f"no loss of references from this server, and no perplexity: {why}")
        self._failed += 1


def _loss(raw: bytes, prompt_tokens: int) -> tuple[float, int] | None:
    """-log p in nats of the tokens between a prompt of so many tokens and the one that was made;
    and how many."""
    try:
        told: dict[str, Any] = json.loads(raw)["choices"][0]["logprobs"]
        tokens, logprobs = told["tokens"][:-1], told["token_logprobs"][prompt_tokens:-1]
        is_chatml = tokens[0] == IM_START and tokens[-1] == IM_END
        is_whole = tuple(tokens[prompt_tokens - 2 : prompt_tokens]) == _END
        if not (is_chatml and is_whole and logprobs):
            return None
        return -sum(float(each) for each in logprobs), len(logprobs)
    except (ValueError, TypeError, KeyError, IndexError):
        return None
