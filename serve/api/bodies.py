"""Bodies of requests: what clients send, checked field by field.

Unknown fields are ignored, as everywhere in this API's world. Known ones that change the answer and
are not supported are refused by name, wherever they differ from what happens anyway.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from qwen_ds.decode.sampling import MAX_LOGPROBS
from serve.api.errors import ApiError, shortened

MAX_CHOICES = 128  # of one request
_MAX_STOPS, _MAX_STOP_LENGTH, _MAX_BIASES = 64, 1000, 1024


def _few(given: object) -> object:
    if isinstance(given, dict) and len(given) > _MAX_BIASES:
        raise ValueError(f"{len(given)} tokens; expected at most {_MAX_BIASES}")
    return given


Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[str, Bias], BeforeValidator(_few)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
StopIds = Annotated[list[Token], Field(max_length=_MAX_STOPS, fail_fast=True)]
JsonObject = dict[str, Any]
# An error for each wrong member of a long list would take seconds, and memory without end.
JsonObjects = Annotated[list[JsonObject], Field(fail_fast=True)]
Choices = Annotated[list[str], Field(fail_fast=True)]
_BRANCHES = {"str", "int", "float", "bool", "dict"}  # of a union, as errors name them


class Body(BaseModel):
    """A JSON object of which unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)

    # Known fields that are not supported, with the values that ask for nothing.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}


class StructuredOutputs(Body):
    """vLLM's way to hold an answer to a form: one of these. Its other forms are refused."""

    _FORMS: ClassVar[tuple[str, ...]] = ("json", "regex", "choice", "json_object")

    json_: JsonObject | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    json_object: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, given: object) -> object:
        """The fields that ask for something: vLLM's own clients send all of them."""
        if not isinstance(given, dict):
            return given
        asked = {k: value for k, value in given.items() if value is not None and value is not False}
        if unknown := next((k for k in asked if k not in cls._FORMS), None):
            raise ValueError(
                f"{shortened(unknown)} is not supported; expected one of {', '.join(cls._FORMS)}"
            )
        return asked


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class SampledBody(Body):
    """Fields that both kinds of completion have."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "best_of": (None, 1), "use_beam_search": (None, False), "length_penalty": (None, 1, 1.0),
        "prompt_logprobs": (None, 0), "truncate_prompt_tokens": (None,), "bad_words": (None, []),
        "allowed_token_ids": (None,), "guided_grammar": (None,), "prompt_embeds": (None,),
        "min_new_tokens": (None, 0), "include_stop_str_in_output": (None, False),
        "guided_whitespace_pattern": (None,), "return_token_ids": (None, False),
        "return_tokens_as_token_ids": (None, False), "logits_processors": (None, []),
        "structural_tag": (None,), "vllm_xargs": (None, {}), "typical_p": (None, 1, 1.0),
        "no_repeat_ngram_size": (None, 0), "num_beams": (None, 1), "penalty_alpha": (None, 0, 0.0),
        "thinking_token_budget": (None,), "regex": (None,), "ebnf": (None,), "json_schema": (None,),
        "custom_logit_processor": (None,), "kv_transfer_params": (None,),
    }  # fmt: skip

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Biases | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopIds | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: JsonObject | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(SampledBody):
    """Body of /v1/chat/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = SampledBody.unsupported | {
        "audio": (None,), "modalities": (None, ["text"]), "prediction": (None,),
        "web_search_options": (None,), "chat_template": (None,), "documents": (None, []),
        "echo": (None, False), "chat_template_kwargs": (None, {}),
    }  # fmt: skip

    messages: Annotated[JsonObjects, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    functions: JsonObjects | None = None
    function_call: Literal["none", "auto"] | JsonObject | None = None
    tools: JsonObjects | None = None
    tool_choice: Literal["none", "auto", "required"] | JsonObject | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


def _prompt(given: object) -> object:
    """A prompt, or several of the kind that the first one has. ValueError names the first wrong."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        expected = "a text, token ids, or a list of texts or of lists of token ids"
        raise ValueError(f"{shortened(given)}; expected {expected}")
    if isinstance(given[0], int):
        _check_tokens(given, "")
        return given
    if len(given) > MAX_CHOICES:
        raise ValueError(f"{len(given)} prompts; expected at most {MAX_CHOICES}")
    kind = str if isinstance(given[0], str) else list
    for place, one in enumerate(given):
        if not isinstance(one, kind):
            expected = "a text" if kind is str else "a list of token ids"
            raise ValueError(f"[{place}] is {shortened(one)}; expected {expected}")
        if isinstance(one, list):
            _check_tokens(one, f"[{place}]")
    return given


def _check_tokens(given: list[object], of: str) -> None:
    for place, token in enumerate(given):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise ValueError(f"{of}[{place}] is {shortened(token)}; expected a token id")


# Checked by hand: pydantic would try every element as every kind.
Prompt = Annotated[
    Any,
    BeforeValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "integer", "minimum": 0}},
                {"type": "array", "items": {"type": "string"}},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                },
            ]
        }
    ),
]


class CompletionBody(SampledBody):
    """Body of /v1/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = SampledBody.unsupported | {
        "suffix": (None, "")
    }

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class OriginalBody(Body):
    """Body of /nlg/text_generate, the original project's route, with its defaults."""

    instruction: str = ""
    text: str = "1+1="
    penalty_alpha: float = 1.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: Annotated[float, Field(gt=0, le=100)] = 0.8
    do_sample: bool = True
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.8
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 50


class TokenizeBody(Body):
    """Body of /tokenize: a prompt, or messages with their functions."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[JsonObjects, Field(min_length=1)] | None = None
    functions: JsonObjects | None = None
    function_call: Literal["none", "auto"] | JsonObject | None = None
    tools: JsonObjects | None = None
    tool_choice: Literal["none", "auto", "required"] | JsonObject | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeBody(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Token], Field(fail_fast=True)]


Kind = TypeVar("Kind", bound=Body)


def read_body(kind: type[Kind], raw: bytes) -> Kind:
    """A body of some kind. ApiError 400 names the field that is wrong."""
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        raise _invalid(error) from None
    if kind.unsupported:
        given = _Loose.model_validate_json(raw).model_extra or {}
        for name, harmless in kind.unsupported.items():
            if name in given and given[name] not in harmless:
                came = f"{name} is not supported"
                raise ApiError(400, f"{came}; leave it out", name, "unsupported_parameter")
    return body


class _Loose(BaseModel):
    model_config = ConfigDict(extra="allow")


def _invalid(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_context=False)
    # Of a union every branch has its say; the deepest is the one that was meant.
    worst = max(found, key=lambda one: len(one["loc"]))
    if worst["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {worst['msg'].removeprefix('Invalid JSON: ')}")
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in worst["loc"]
        if isinstance(part, int) or (part.isidentifier() and part not in _BRANCHES)
    ).removeprefix(".")
    message, place = worst["msg"].removeprefix("Value error, "), place or "the body"
    param = str(worst["loc"][0]) if worst["loc"] else None
    if worst["type"] == "missing":
        return ApiError(400, f"there is no {place}; expected one", param)
    if worst["type"] != "value_error":
        expected = re.sub(r"^Input should be ", "", message)
        return ApiError(400, f"{place} is {shortened(worst['input'])}; expected {expected}", param)
    colon = "" if re.match(r"\[\d", message) else ": "  # of a place inside
    return ApiError(400, f"{place}{colon}{message}", param)
