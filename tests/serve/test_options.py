"""Options of the commands: checked one by one, from the command line and from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from serve.options import PredictOptions, parse


def test_options_are_checked_and_the_launchers_rank_is_accepted(tmp_path: Path) -> None:
    given = ["--local_rank=3", "--model", "m", "--input", "a", "b", "--output", "o"]
    options = parse(
        PredictOptions, "", [*given, "--data.format", "adgen", "--overwrite", "--do_sample=true"]
    )
    assert (options.input, options.format, options.overwrite, options.do_sample) == (
        ["a", "b"],
        "adgen",
        True,
        True,
    )
    for wrong, message in (
        (["--bach_size", "3"], "unknown option bach_size; the nearest is batch_size"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--temperature", "warm"], "temperature"),
        (["--top_p", "2"], "top_p is 2.0"),
    ):
        with pytest.raises(UserError, match=message):
            parse(PredictOptions, "", [*given, *wrong])
    with pytest.raises(UserError, match="output"):
        parse(PredictOptions, "", ["--model", "m", "--input", "a"])
    recipe = tmp_path / "predict.yaml"
    recipe.write_text("model: m\ninput: [a]\noutput: o\ntop_k: 7\n")
    assert parse(PredictOptions, "", ["--config", str(recipe)]).top_k == 7


@pytest.mark.parametrize(
    "text",
    [
        "[END]",
        "[]",
        "[1]",
        "null",
        "~",
        "1e5",
        "a: b # c",
        "{a: b}",
        " a ",
        "a\nb",
        "&a",
        "'a'",
        "\t",
        "裙",
    ],
)
def test_a_text_stays_as_it_is(text: str) -> None:
    """None is read as YAML: a stop of [END] is not one of END."""
    given = ["--model", "m", "--input", "a", "--output", "o"]

    def options(*words: str) -> PredictOptions:
        return parse(PredictOptions, "", [*given, *words])

    assert options("--stop", text).stop == [text]
    assert options("--stop", text, "--overwrite").stop == [text]
    assert options("--choice", text, "b").choice == [text, "b"]
    assert options("--regex", text).regex == text


def test_lists_of_texts_may_be_json() -> None:
    given = ["--model", "m", "--input", "a", "--output", "o", "--stop", '["[a]", "b"]']
    assert parse(PredictOptions, "", given).stop == ["[a]", "b"]
