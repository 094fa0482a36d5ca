"""From the fields of a request to the engine's sampling parameters and structure."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_ds.decode.exceptions import InvalidSampling
from qwen_ds.decode.sampling import MAX_LOGPROBS, SamplingParams, row_seed
from serve.api.bodies import SampledBody
from serve.api.errors import ApiError, shortened
from serve.api.jobs import Job
from serve.api.served import Served
from serve.structure import Structure

# OpenAI's defaults.
_TEMPERATURE, _TOP_P = 1.0, 1.0
# One answer as long as the longest context may have all of its own.
_MOST_LOGPROBS = 32_768 * (MAX_LOGPROBS + 1)


def sampling_params(
    body: SampledBody,
    served: Served,
    new_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The parameters of a request's first choice. ApiError 400: a value that cannot be honoured."""
    temperature = _TEMPERATURE if body.temperature is None else body.temperature
    given: dict[str, Any] = {
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        "logit_bias": _biases(body.logit_bias or {}, served.encoding.n_vocab),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if temperature > 0:  # 0 is greedy
        given |= {"do_sample": True, "temperature": temperature}
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
    try:
        return SamplingParams(
            max_new_tokens=new_tokens,
            top_p=_TOP_P if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),  # vLLM's -1 is no limit
            seed=seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **given,
        )
    except InvalidSampling as error:
        name = "max_tokens" if error.name == "max_new_tokens" else error.name
        expected = error.expected.replace("max_new_tokens", "max_tokens")
        raise ApiError(400, f"{name} is {error.value}; expected {expected}", name) from None


def stop_ids_of(body: SampledBody, served: Served) -> tuple[int, ...]:
    """The token ids that end an answer beside the model's own. ApiError 400: one that the
    vocabulary lacks."""
    size = served.encoding.n_vocab
    for place, token in enumerate(body.stop_token_ids or ()):
        if token >= size:
            came = f"stop_token_ids[{place}] is {token}"
            raise ApiError(400, f"{came}; expected 0 to {size - 1}", "stop_token_ids")
    return tuple(dict.fromkeys(body.stop_token_ids or ()))


def seed_of_choice(seed: int, choice: int) -> int:
    """The seed of one of several choices; the first has the request's own."""
    return seed if choice == 0 else row_seed(seed, choice)


def bound_logprobs(jobs: Sequence[Job]) -> None:
    """ApiError 400: a request that asks for more log-probabilities than an answer may have."""
    told = sum(
        _told(job.sampling.max_new_tokens, job.sampling.logprobs)
        + _told(len(job.ids), job.sampling.prompt_logprobs)
        for job in jobs
    )
    if told > _MOST_LOGPROBS:
        came = f"{told:,} log-probabilities (choices x tokens x (logprobs + 1))"
        raise ApiError(400, f"{came}; expected at most {_MOST_LOGPROBS:,}", "logprobs")


def _told(tokens: int, alternatives: int | None) -> int:
    return 0 if alternatives is None else tokens * (alternatives + 1)


def _biases(given: Mapping[str, float], tokens: int) -> tuple[tuple[int, float], ...]:
    for token in given:
        # int() refuses thousands of digits.
        number = int(token) if token.isascii() and token.isdigit() and len(token) < 10 else tokens
        if number >= tokens or token != str(number):
            came = f"logit_bias has the key {shortened(token)}"
            raise ApiError(400, f"{came}; expected token ids, 0 to {tokens - 1}", "logit_bias")
    return tuple((int(token), bias) for token, bias in given.items())


def structure_of(body: SampledBody) -> Structure | None:
    """The form that the answer is held to. ApiError 400: two forms, or one that is not known."""
    asked = list[Structure]()
    if body.response_format is not None:
        asked += _response_format(body.response_format)
    if body.guided_json is not None:
        asked.append(Structure("json_schema", body.guided_json, "guided_json"))
    if body.guided_regex is not None:
        asked.append(Structure("regex", body.guided_regex, "guided_regex"))
    if body.guided_choice is not None:
        asked.append(Structure("choice", body.guided_choice, "guided_choice"))
    if (forms := body.structured_outputs) is not None:
        name = "structured_outputs"
        asked += [Structure("json_schema", forms.json_, name)] if forms.json_ is not None else []
        asked += [Structure("regex", forms.regex, name)] if forms.regex is not None else []
        asked += [Structure("choice", forms.choice, name)] if forms.choice is not None else []
        asked += [Structure("json_object", None, name)] if forms.json_object else []
    if len(asked) > 1:
        came = "more than one form is set for the answer"
        expected = "one of response_format, structured_outputs and guided_json, _regex or _choice"
        raise ApiError(400, f"{came}; expected {expected}", form_name(body))
    return asked[0] if asked else None


def form_name(body: SampledBody) -> str:
    """The field that asks for a form; the first of several."""
    names = ("response_format", "guided_json", "guided_regex", "guided_choice")
    return next((name for name in names if getattr(body, name) is not None), "structured_outputs")


def _response_format(given: Mapping[str, Any]) -> list[Structure]:
    kind = given.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [Structure("json_object", None)]
    schema = given.get("json_schema")
    if kind == "json_schema" and isinstance(schema, dict) and "schema" in schema:
        return [Structure("json_schema", schema["schema"], "response_format")]
    came = f"response_format has type {shortened(kind)}"
    expected = "text or json_object, or json_schema with an object json_schema that has a schema"
    raise ApiError(400, f"{came}; expected {expected}", "response_format")
