"""Options that name a server, and which of a command's others go with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import httpx

from qwen_ds.disk.read import read_text
from qwen_ds.errors import UserError

_KEY_BYTES = 16_384
_EXAMPLE = "expected a URL such as http://gpu01:8000/v1"


@dataclass(frozen=True)
class EndpointOptions:
    """Options of commands that can have their answers from a server."""

    endpoint: str | None = None
    """URL of a server with OpenAI's HTTP API (vLLM, SGLang, llama.cpp) that answers in place of a
    model here, such as http://gpu01:8000/v1."""
    endpoint_model: str | None = None
    """With endpoint: the server's name of the model; unset: the first that it lists."""
    api_key_file: str | None = None
    """With endpoint: file that holds the server's key and nothing else."""


def given_options(options: Any) -> set[str]:
    """Names of the options that have another value than their default."""
    defaults = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(options)
    }
    return {name for name, value in vars(options).items() if value != defaults[name]}


def check_source(options: EndpointOptions, model: str | None, here: Sequence[str]) -> None:
    """Check that one of model and endpoint is given, and what goes with it.

    `here` names the options that only a model here has. UserError: neither, both, or an option that
    would have no effect.
    """
    given = given_options(options)
    if options.endpoint is None:
        if model is None:
            raise UserError("no model given; expected --model or --endpoint")
        for name in ("endpoint_model", "api_key_file", "concurrency"):
            if name in given:
                raise UserError(f"--{name} is given without --endpoint; expected both or neither")
        return
    if model is not None:
        raise UserError(
            "--model and --endpoint are given; expected one of them (--endpoint_model names the "
            "server's model)"
        )
    if came := next((name for name in here if name in given), None):
        raise UserError(f"--{came} is for a model here; expected none with --endpoint")


def base_url(given: str, option: str = "endpoint") -> str:
    """The URL that paths such as /models are added to. UserError: not a URL of HTTP."""
    try:
        url = httpx.URL(given.strip())
    except (httpx.InvalidURL, ValueError) as error:
        raise UserError(f"--{option} {given}: {error}; {_EXAMPLE}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"--{option} {given}: not http:// or https://; {_EXAMPLE}")
    if url.userinfo or url.query or url.fragment:
        # It would stand in settings.json and in messages.
        raise UserError(
            f"--{option} {url.host}: a user name, password or query in the URL; expected none, and "
            "a key in --api_key_file"
        )
    text = str(url).rstrip("/")
    return text.removesuffix("/chat/completions").removesuffix("/completions").rstrip("/")


def read_key(file: str | None) -> str | None:
    """The key in a file. UserError: no such file, or not one line of ASCII."""
    if file is None:
        return None
    key = read_text(Path(file), _KEY_BYTES).strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"{file}: not a key; expected one line of ASCII characters")
    return key
