"""The sides of an evaluation: which model or file each is, and its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from serve.options import EvaluateOptions, parse
from serve.scores.sides import sides_of


def options_for(*words: str) -> EvaluateOptions:
    return parse(EvaluateOptions, "", ["--output_dir", "out", *words])


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("base", "merged", "other/merged", "run/adapter", "a=b"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("base", "merged", "other/merged", "a=b"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    return tmp_path


def test_each_place_is_a_model_or_an_adapter_on_the_model(folders: Path) -> None:
    base, merged, run = (str(folders / name) for name in ("base", "merged", "run"))
    given = ["--compare", base, f"tuned={run}", merged, "Qwen/Qwen-7B-Chat", str(folders / "a=b")]
    sides = sides_of(options_for("--model", base, *given, "--data", "d"))
    found = [(side.name, side.options.model, side.options.adapter, side.folder) for side in sides]
    assert found == [
        ("base", base, [], Path("out/base")),
        ("tuned", base, [run], Path("out/tuned")),
        ("merged", merged, [], Path("out/merged")),
        ("Qwen-7B-Chat", "Qwen/Qwen-7B-Chat", [], Path("out/Qwen-7B-Chat")),
        ("a=b", str(folders / "a=b"), [], Path("out/a=b")),
    ]
    assert all(side.options.compare == [] and side.given is None for side in sides)


def test_one_model_and_one_file_have_no_folder_of_their_own(folders: Path) -> None:
    (side,) = sides_of(options_for("--model", str(folders / "base"), "--data", "d"))
    assert (side.name, side.folder, side.given) == ("base", Path("out"), None)
    (side,) = sides_of(options_for("--predictions", "x/answers.jsonl"))
    assert (side.name, side.folder, side.given) == ("answers", Path("out"), Path("x/answers.jsonl"))
    assert side.predictions == side.given


def test_a_model_with_an_adapter_is_not_called_as_the_model_alone(folders: Path) -> None:
    given = ["--model", str(folders / "base"), "--adapter", f"{folders}/run/adapter/"]
    (side,) = sides_of(options_for(*given, "--general", "g"))
    assert (side.name, side.folder) == ("base + adapter", Path("out"))


def test_a_server_s_models_are_named_as_it_names_them() -> None:
    given = ["--endpoint", "http://h/v1", "--compare", "base", "new=org/tuned", "--data", "d"]
    sides = sides_of(options_for(*given))
    assert [(side.name, side.options.endpoint_model) for side in sides] == [
        ("base", "base"),
        ("new", "org/tuned"),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "{0}/merged", "{0}/other/merged"], "two are named merged, .*NAME=PLACE"),
        (["--compare", "{0}/base", "{0}/run"], "run: no model's folder; expected one, or --model"),
        (["--compare", "{0}/base", "--adapter", "{0}/run"], "--compare and --adapter are given"),
        (["--compare", "{0}/base", "--model", "{0}/base"], "no place of --compare is an adapter"),
        (["--compare", "..={0}/base"], "'..' is no name for a folder; expected NAME=PLACE"),
        (["--compare", "a/b={0}/base"], "'a/b' is no name"),
        (["--compare", "x="], "expected|is empty|no name"),
        (["--predictions", "p", "--compare", "{0}/base"], "--predictions and --compare are given"),
        (["--predictions", "p", "--endpoint", "http://h"], "--predictions and --endpoint are"),
        (["--predictions", "a/p", "b/p"], "two are named p, a/p and b/p"),
    ],
)
def test_what_cannot_be_meant_is_named(folders: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sides_of(options_for(*(word.format(folders) for word in words), "--data", "d"))


def test_a_comparison_needs_rows(folders: Path) -> None:
    with pytest.raises(UserError, match="no data given; expected --data"):
        sides_of(options_for("--compare", str(folders / "base"), str(folders / "merged")))
