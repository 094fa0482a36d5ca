"""From the fields of a request to the engine's sampling parameters and structure."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from qwen_ds.decode.exceptions import InvalidSampling
from qwen_ds.decode.sampling import SamplingParams, row_seed
from serve.api.bodies import SampledBody
from serve.api.errors import ApiError
from serve.structure import Structure

# OpenAI's defaults.
_TEMPERATURE, _TOP_P = 1.0, 1.0


def sampling_params(
    body: SampledBody,
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
        "logit_bias": _biases(body.logit_bias or {}),
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
        raise ApiError(400, f"{name} is {error.value}; expected {error.expected}", name) from None


def seed_of_choice(seed: int, choice: int) -> int:
    """The seed of one of several choices; the first has the request's own."""
    return seed if choice == 0 else row_seed(seed, choice)


def _biases(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    if not all(token.isascii() and token.isdigit() for token in given):
        raise ApiError(400, "logit_bias: expected token ids as keys", "logit_bias")
    return tuple((int(token), bias) for token, bias in given.items())


def structure_of(body: SampledBody) -> Structure | None:
    """The form that the answer is held to. ApiError 400: two forms, or one that is not known."""
    asked: list[Structure] = []
    if body.response_format is not None:
        asked += _response_format(body.response_format)
    if body.guided_json is not None:
        asked.append(Structure("json_schema", body.guided_json))
    if body.guided_regex is not None:
        asked.append(Structure("regex", body.guided_regex))
    if body.guided_choice is not None:
        asked.append(Structure("choice", body.guided_choice))
    if (forms := body.structured_outputs) is not None:
        asked += [Structure("json_schema", forms.json_)] if forms.json_ is not None else []
        asked += [Structure("regex", forms.regex)] if forms.regex is not None else []
        asked += [Structure("choice", forms.choice)] if forms.choice is not None else []
        asked += [Structure("json_object", None)] if forms.json_object else []
    if len(asked) > 1:
        raise ApiError(400, "two forms are asked for; expected one", "response_format")
    return asked[0] if asked else None


def _response_format(given: Mapping[str, Any]) -> list[Structure]:
    kind = given.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [Structure("json_object", None)]
    schema = given.get("json_schema")
    if kind == "json_schema" and isinstance(schema, dict) and "schema" in schema:
        return [Structure("json_schema", schema["schema"])]
    came = "response_format" if kind != "json_schema" else "response_format.json_schema"
    expected = "type text, json_object, or json_schema with a schema in json_schema"
    raise ApiError(400, f"{came} is not understood; expected {expected}", "response_format")
