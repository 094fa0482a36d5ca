"""/v1/completions: prompts as texts or ids, answers with echo and log-probabilities."""

from __future__ import annotations

import secrets
import time
from codecs import IncrementalDecoder, getincrementaldecoder
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from qwen_ds.decode.request import PromptFigures
from qwen_ds.decode.sampler import TokenLogprobs
from serve.api.bodies import MAX_CHOICES, CompletionBody
from serve.api.errors import ApiError
from serve.api.jobs import Event, Job
from serve.api.sampling import (
    bound_logprobs,
    sampling_params,
    seed_of_choice,
    stop_ids_of,
    structure_of,
)
from serve.api.served import Served

Json = dict[str, Any]
_DEFAULT_TOKENS = 16  # OpenAI's
_Utf8 = getincrementaldecoder("utf-8")


@dataclass(slots=True)
class TextChoice:
    """One answer as it comes."""

    index: int
    prompt: tuple[int, ...]
    prompt_text: str
    text: str = ""
    tokens: list[TokenLogprobs] = field(default_factory=list)
    prompt_tokens: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    offset: int = 0  # of the next token in the text
    decoder: IncrementalDecoder = field(default_factory=partial(_Utf8, "replace"))


class TextRequest:
    """One request, from its body to its answers. ApiError 400: a prompt that cannot be."""

    def __init__(self, body: CompletionBody, served: Served, room: int) -> None:
        self.body, self._served = body, served
        self.id = f"cmpl-{secrets.token_hex(16)}"
        self.created = int(time.time())
        self.model = served.name_of(body.model)
        adapter = served.adapter_of(body.model)
        prompts = _prompts(body)
        n = body.n or 1
        if len(prompts) * n > MAX_CHOICES:
            came = f"{len(prompts)} prompts with {n} choices each"
            raise ApiError(400, f"{came}; expected at most {MAX_CHOICES} choices", "prompt")
        asked = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        self.only_prompt = asked == 0
        if self.only_prompt and not body.echo:
            raise ApiError(400, "max_tokens is 0 without echo; expected 1 or more", "max_tokens")
        structure, stop_ids = structure_of(body), stop_ids_of(body, served)
        self.jobs: list[Job] = []
        self.choices: list[TextChoice] = []
        prompt_logprobs = body.logprobs if body.echo else None
        skips = bool(body.skip_special_tokens)
        for prompt in prompts:
            ids = tuple(served.encoding.ordinary(prompt) if isinstance(prompt, str) else prompt)
            if not ids:
                raise ApiError(400, "prompt is empty; expected at least one token", "prompt")
            new_tokens = served.room_for_answer(len(ids), room, max(asked, 1), "prompt")
            text = prompt if isinstance(prompt, str) else served.text_of(ids, "prompt")
            sampling = sampling_params(body, served, new_tokens, body.logprobs, prompt_logprobs)
            for i in range(n):
                own = replace(sampling, seed=seed_of_choice(sampling.seed, i))
                self.jobs.append(
                    Job(ids, own, tuple(body.stops), stop_ids, skips, adapter, structure)
                )
                self.choices.append(TextChoice(len(self.choices), ids, text))
        bound_logprobs(self.jobs)

    def take(self, index: int, event: Event) -> None:
        """Take an event of an answer that is sent as a whole."""
        choice = self.choices[index]
        self._take_prompt(choice, event.prompt)
        if self.only_prompt:
            choice.finish_reason = "length"
            return
        choice.text += event.text
        if event.logprobs is not None:
            choice.tokens.append(event.logprobs)
        choice.finish_reason = event.finish_reason

    def _take_prompt(self, choice: TextChoice, prompt: PromptFigures | None) -> None:
        if prompt is not None:
            choice.prompt_tokens = prompt.logprobs

    def answer(self, usage: Json) -> Json:
        """The whole answer."""
        choices = []
        for choice in self.choices:
            text = choice.prompt_text + choice.text if self.body.echo else choice.text
            one = {"index": choice.index, "text": text, "finish_reason": choice.finish_reason}
            one["logprobs"] = None
            if self.body.logprobs is not None:
                told = self._prompt_told(choice) if self.body.echo else []
                one["logprobs"] = self._logprobs(choice, [*told, *map(self._told, choice.tokens)])
            choices.append(one)
        return self._envelope(choices) | {"usage": self._usage(usage)}

    def first_chunk(self, index: int) -> Json | None:
        """The chunk that opens an answer; None: nothing is to be told yet."""
        return None

    def chunks(self, index: int, event: Event) -> list[Json]:
        """The chunks that an event brings."""
        choice, text, told = self.choices[index], event.text, list[_Told]()
        if event.prompt is not None and self.body.echo:
            self._take_prompt(choice, event.prompt)
            text = choice.prompt_text + text
            told = self._prompt_told(choice)
        if self.only_prompt:
            return [self._chunk(choice, choice.prompt_text, told, "length")]
        if event.logprobs is not None:
            told.append(self._told(event.logprobs))
        if not text and not told and event.finish_reason is None:
            return []
        return [self._chunk(choice, text, told, event.finish_reason)]

    def usage_chunk(self, usage: Json) -> Json:
        """The last chunk, where usage is asked for."""
        return self._envelope([]) | {"usage": self._usage(usage)}

    def _usage(self, usage: Json) -> Json:
        """Without the one token that the engine makes where only the prompt is wanted."""
        if not self.only_prompt:
            return usage
        return usage | {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}

    def _chunk(self, choice: TextChoice, text: str, told: list[_Told], reason: str | None) -> Json:
        one = {"index": choice.index, "text": text, "finish_reason": reason, "logprobs": None}
        if self.body.logprobs is not None:
            one["logprobs"] = self._logprobs(choice, told)
        return self._envelope([one])

    def _envelope(self, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _prompt_told(self, choice: TextChoice) -> list[_Told]:
        """The prompt's tokens, of which the first has no probability."""
        token = choice.prompt[0]
        first = _Told(self._spelled(token), self._bytes(token), None, None)
        told = [first, *map(self._told, choice.prompt_tokens)]
        told[-1] = replace(told[-1], ends=True)
        return told

    def _told(self, one: TokenLogprobs) -> _Told:
        top = {self._spelled(token): _finite(logprob) for token, logprob in one.top}
        raw = self._bytes(one.token)
        return _Told(self._spelled(one.token), raw, _finite(one.logprob), top)

    def _bytes(self, token: int) -> bytes:
        return self._served.encoding.token_bytes(token)

    def _spelled(self, token: int) -> str:
        """A token's text; bytes that are no whole character as OpenAI spells them."""
        raw = self._bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _logprobs(self, choice: TextChoice, told: list[_Told]) -> Json:
        offsets = []
        for one in told:
            offsets.append(choice.offset)
            # A character may have several tokens; its last one brings it.
            choice.offset += len(choice.decoder.decode(one.raw, one.ends))
        return {
            "tokens": [one.text for one in told],
            "token_logprobs": [one.logprob for one in told],
            "top_logprobs": [one.top for one in told] if self.body.logprobs else None,
            "text_offset": offsets,
        }


@dataclass(frozen=True, slots=True)
class _Told:
    """A token as an answer tells it."""

    text: str
    raw: bytes
    logprob: float | None
    top: dict[str, float] | None
    ends: bool = False  # the prompt; what follows is a text of its own


def _finite(logprob: float) -> float:
    """A log-probability that JSON has a number for."""
    return max(logprob, -9999.0)


def _prompts(body: CompletionBody) -> list[str] | list[list[int]]:
    is_one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    return [body.prompt] if is_one else list(body.prompt)
