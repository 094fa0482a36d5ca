"""Errors of decoding name no command-line option: every front words them for its own users."""

from __future__ import annotations

import pytest

from qwen_ds.decode.exceptions import (
    DecodingError,
    InvalidGrammar,
    InvalidSampling,
    LogitsNotFinite,
    NoTokenLeft,
    PromptTooLong,
    RowOutOfMemory,
)


@pytest.mark.parametrize(
    "error",
    [
        InvalidSampling("top_p", 2, "1"),
        InvalidGrammar("regex", "unclosed group"),
        PromptTooLong(9, 5),
        LogitsNotFinite(),
        NoTokenLeft(),
        NoTokenLeft("of its limits"),
        RowOutOfMemory(),
    ],  # fmt: skip
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_one_line_that_any_front_can_show(error: DecodingError) -> None:
    assert isinstance(error, ValueError)
    assert str(error) and "\n" not in str(error) and "--" not in str(error)
