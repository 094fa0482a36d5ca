"""The URL, the key, and options that go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from serve.endpoint.options import base_url, check_source, read_key
from serve.options import PredictOptions, parse


def test_a_url_is_taken_as_people_paste_it() -> None:
    for given in (
        "http://gpu01:8000/v1",
        "http://gpu01:8000/v1/",
        " http://gpu01:8000/v1/chat/completions",
    ):
        assert base_url(given) == "http://gpu01:8000/v1"


@pytest.mark.parametrize(
    "given", ["gpu01:8000/v1", "ftp://a/v1", "http://", "http://a:b:c", "", "http://u:p@a/v1"]
)
def test_what_is_no_url_is_named(given: str) -> None:
    with pytest.raises(UserError, match="expected") as error:
        base_url(given)
    assert "u:p" not in str(error.value), "a password stays out of messages"


@pytest.mark.parametrize("text", ["", "\n", "two\nlines", "schlüssel"])
def test_a_key_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(UserError, match="not a key; expected one line"):
        read_key(str(file))
    file.write_text(" sk-123 \n")
    assert read_key(str(file)) == "sk-123"
    with pytest.raises(UserError, match="none: "):
        read_key(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model given; expected --model or --endpoint"),
        (["--model", "m", "--endpoint", "u"], "expected one of them"),
        (["--endpoint", "u", "--dtype", "float32"], "--dtype is for a model here"),
        (["--model", "m", "--concurrency", "3"], "--concurrency is given without --endpoint"),
        (["--model", "m", "--api_key_file", "f"], "--api_key_file is given without --endpoint"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(words: list[str], message: str) -> None:
    options = parse(PredictOptions, "", ["--input", "i", "--output", "o", *words])
    with pytest.raises(UserError, match=message):
        check_source(options, options.model, ["adapter", "dtype"])
