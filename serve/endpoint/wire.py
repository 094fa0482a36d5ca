"""OpenAI's HTTP API on the wire: bodies of requests, answers, errors and streams of events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import turns_of
from serve.answering import Answer, Question

MAX_RETRY_AFTER = 120.0
_LONGEST_MESSAGE = 300
_OF_THE_ROW = (400, 404, 413, 422)
_OF_THE_MOMENT = (408, 409, 429)
_TOO_LONG = ("context", "too long", "maximum length", "max_model_len", "too large")


class EndpointRefused(DecodingError):
    """A request that the server will not answer, by the server's own words."""

    @property
    def too_long(self) -> bool:
        """Whether the server seems to find the prompt too long."""
        return any(words in str(self).lower() for words in _TOO_LONG)


class Trouble(Exception):
    """A request that failed and may succeed when it is sent again.

    Args:
        retry_after: seconds after which the server wants it again; None: it does not say.
        may_be_the_row: whether this request may be the reason.
    """

    def __init__(
        self, text: str, retry_after: float | None = None, may_be_the_row: bool = False
    ) -> None:
        super().__init__(text)
        self.retry_after, self.may_be_the_row = retry_after, may_be_the_row


def request_of(question: Question, model: str, stream: bool = False) -> tuple[str, bytes]:
    """Path and body of a request."""
    sampling = question.sampling
    body: dict[str, Any] = {"model": model, "max_tokens": sampling.max_new_tokens}
    body |= _how_to_sample(sampling) | _limits(question)
    body["stream"] = stream
    if isinstance(question.asked, str):
        path, body["prompt"] = "/completions", question.asked
    else:
        path = "/chat/completions"
        turns = turns_of(question.asked)
        body["messages"] = [{"role": turn.role, "content": turn.text} for turn in turns]
    return path, json.dumps(body).encode()


def _how_to_sample(sampling: SamplingParams) -> dict[str, Any]:
    """The fields that choose tokens; beyond temperature, top_p and seed only those that act."""
    found: dict[str, Any] = {"temperature": 0}
    if sampling.do_sample:
        found = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        # Not in OpenAI's own API, but in the servers' that have it.
        found |= {"top_k": sampling.top_k} if sampling.top_k else {}
        found |= {"min_p": sampling.min_p} if sampling.min_p else {}
        found["seed"] = sampling.seed >> 32  # 31 bits: some servers take no more
    if sampling.repetition_penalty != 1:  # not in OpenAI's API, either
        found["repetition_penalty"] = sampling.repetition_penalty
    for name in ("presence_penalty", "frequency_penalty"):
        found |= {name: vars(sampling)[name]} if vars(sampling)[name] else {}
    if sampling.logit_bias:
        found["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.logprobs is not None:
        found |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    return found


def _limits(question: Question) -> dict[str, Any]:
    """The fields that end an answer, or hold it to a structure. OpenAI's API lacks min_tokens,
    ignore_eos and structured_outputs, vLLM's has them."""
    sampling, structure = question.sampling, question.structure
    found: dict[str, Any] = {"stop": list(question.stop_strings)} if question.stop_strings else {}
    found |= {"min_tokens": sampling.min_tokens} if sampling.min_tokens else {}
    found |= {"ignore_eos": True} if sampling.ignore_eos else {}
    if structure is None:
        return found
    match structure.kind:
        case "json_object":
            found["response_format"] = {"type": "json_object"}
        case "json_schema":
            schema = {"name": "answer", "schema": structure.value, "strict": True}
            found["response_format"] = {"type": "json_schema", "json_schema": schema}
        case kind:
            found["structured_outputs"] = {kind: structure.value}
    return found


def check_status(url: str, status: int, retry_after: str | None, raw: bytes) -> None:
    """Check an answer's status.

    Raises:
        Trouble: send it again later.
        EndpointRefused: this request will not be answered.
        UserError: none will be.
    """
    if status == 200:
        return
    said = _message(raw)
    came = f"{url} answered {status}" + (f" ({said})" if said else "")
    if status in _OF_THE_MOMENT or status >= 500:
        may_be_the_row = status not in (408, 429, 502, 503, 504)
        raise Trouble(came, _seconds(retry_after), may_be_the_row)
    if status in _OF_THE_ROW:
        raise EndpointRefused(came)
    if status in (401, 403):
        raise UserError(f"{came}; expected a key that it takes (--api_key_file)")
    raise UserError(f"{came}; expected a server with OpenAI's API, such as http://gpu01:8000/v1")


def _message(raw: bytes) -> str:
    """The words of an error, on one line."""
    try:
        found = json.loads(raw)
    except ValueError:
        found = raw.decode(errors="replace")
    while isinstance(found, dict):
        found = next((found[k] for k in ("error", "message", "detail") if found.get(k)), "")
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            when = parsedate_to_datetime(retry_after)
            seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        except ValueError:
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER) if seconds == seconds else None


def answer_of(url: str, raw: bytes) -> Answer:
    """The answer in a body. Trouble: it is cut off, or no answer at all."""
    try:
        body = json.loads(raw)
        (choice,) = body["choices"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        reason = choice.get("finish_reason") or "stop"
        usage = body.get("usage") or {}
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        logprobs = (choice.get("logprobs") or {}).get("content")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Trouble(f"{url} answered with something else than an answer", None, True) from None
    if reason in ("abort", "error"):  # vLLM, when it is stopped
        raise Trouble(f"{url} ended an answer with {reason}", None, True)
    prompt_tokens, new_tokens = (n if isinstance(n, int) else None for n in counts)
    logprobs = logprobs if isinstance(logprobs, list) else None
    text = text if isinstance(text, str) else ""
    return Answer(text, str(reason), prompt_tokens, new_tokens, logprobs)


def model_names(url: str, raw: bytes) -> list[str]:
    """The models that a server lists. UserError: it lists none."""
    try:
        names = [str(one["id"]) for one in json.loads(raw)["data"]]
    except (ValueError, TypeError, KeyError):
        names = []
    if not names:
        raise UserError(f"{url} lists no model; expected a server with OpenAI's API")
    return names


def events(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the data of server-sent events.

    Lines end at line feeds alone: httpx's own reader would also cut at U+2028 and U+0085, which
    JSON may hold as they are.
    """
    held = b""
    for chunk in chunks:
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def delta_of(url: str, data: bytes) -> tuple[str, str | None]:
    """The text that an event adds, and the finish reason if it ends the answer.

    EndpointRefused: the server has given up. Trouble: not an event of this API.
    """
    try:
        body = json.loads(data)
        if "error" in body:
            raise EndpointRefused(f"{url} gave up ({_message(data)})")
        if not body.get("choices"):  # counts
            return "", None
        choice = body["choices"][0]
        delta = choice["delta"].get("content") if "delta" in choice else choice["text"]
        reason = choice.get("finish_reason")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, EndpointRefused):
            raise
        raise Trouble(f"{url} streamed something else than an answer") from None
    return delta if isinstance(delta, str) else "", str(reason) if reason else None
