"""Mistakes at the start of a server are one line, before an engine is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.recipe.parser import parse_options
from serve.api.listening import url_of
from serve.api.options import ApiOptions
from serve.api.server import serve


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "MODEL", "--port", "PORT"], "--port .* of 127.0.0.1: Address already in use"),
        (["--model", "MODEL", "--port", "70000"], "--port is 70000; expected 0 to 65535"),
        (["--model", "/none/there"], "/none/there"),
        (["--model", "MODEL", "--adapter", "a=/none"], "/none"),
        (["--model", "MODEL", "--adapter", "a=/x", "a=/y"], "two adapters are named a"),
        (["--model", "MODEL", "--ssl_certfile", "/none.pem"], "/none.pem"),
        (["--model", "MODEL", "--ssl_keyfile", "/none.pem"], "without --ssl_certfile"),
        (["--model", "MODEL", "--ssl_ca_certs", "/none.pem"], "without --ssl_certfile"),
        (
            ["--model", "MODEL", "--ssl_certfile", "/none.pem", "--ssl_keyfile_password", "a",
             "--ssl_keyfile_password_file", "b"],
            "expected one of them",
        ),
        (["--model", "MODEL", "--api_key_file", "/none.key"], "/none.key"),
        (["--model", "MODEL", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--model", "MODEL", "--served_model_name", "a", "a"], "different names"),
    ],
    ids=[
        "port", "no port", "model", "adapter", "two adapters", "certificate", "half a pair",
        "half another", "two passwords", "keys", "host", "names",
    ],
)  # fmt: skip
def test_a_mistake_at_the_start_is_one_line(full_dir: Path, words: list[str], message: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {"MODEL": str(full_dir), "PORT": str(taken.getsockname()[1])}
        given = [names.get(word, word) for word in words]
        with pytest.raises(UserError, match=message) as error:
            serve(parse_options(ApiOptions, "", given))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "url"),
    [
        (["--host", "::1"], "http://[::1]:80"),
        (["--host", "127.0.0.1", "--ssl_certfile", "a.pem"], "https://127.0.0.1:80"),
    ],
    ids=["IPv6", "https"],
)
def test_the_address_is_one_that_a_browser_takes(words: list[str], url: str) -> None:
    assert url_of(parse_options(ApiOptions, "", ["--model", "m", *words]), 80) == url
