"""Several adapters in one prediction: each row by the one that it names, and mistakes in one line.

By the command's own parser, to the lines of the output."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.errors import UserError
from serve.files.prediction import predict
from serve.options import EvaluateOptions, PredictOptions, parse
from serve.scores.report import evaluate
from tests.serve.engine.test_adapters import make_adapter
from tests.serve.files.test_prediction import FAST, interrupted, read_lines, write_rows

NAMES = ["zh", None, "law", "", "zh", "no", "law", 3]


@pytest.fixture(scope="module")
def folders(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "zh": {"target_modules": ["c_attn", "w1"], "use_dora": True},
        "law": {"target_modules": ["c_proj"]},
    }
    return {
        name: make_adapter(small_dir, root / name, kind, seed)
        for seed, (name, kind) in enumerate(kinds.items())
    }


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "rows.jsonl",
        [{"content": f"row {i}", "adapter": name} for i, name in enumerate(NAMES)],
    )


def run(model: Path, rows: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    words = ["--model", str(model), "--input", str(rows), "--output", str(output), *FAST, *more]
    options = parse(PredictOptions, "", words)
    predict(options.model, options.input, output, options)
    return read_lines(output)


def named(folders: dict[str, Path], *more: str) -> list[str]:
    return ["--adapter", *(f"{name}={folder}" for name, folder in folders.items()), *more]


def test_each_row_is_answered_by_the_adapter_that_it_names(
    small_dir: Path, rows: Path, folders: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    alone = {
        name: run(small_dir, rows, tmp_path / str(name), *more)
        for name, more in (
            (None, ()),
            ("zh", ("--adapter", str(folders["zh"]))),
            ("law", ("--adapter", str(folders["law"]))),
        )
    }
    assert not any("adapter" in line for lines in alone.values() for line in lines)
    texts = {tuple(line["prediction"] for line in lines) for lines in alone.values()}
    assert len(texts) == 3, "or nothing is told apart"
    capsys.readouterr()
    lines = run(small_dir, rows, tmp_path / "out", *named(folders))
    said = "".join(capsys.readouterr())
    assert [line["adapter"] for line in lines] == ["zh", None, "law", None, "zh", "no", "law", "3"]
    for i, (line, name) in enumerate(zip(lines, NAMES, strict=True)):
        if name in ("no", 3):
            assert (line["finish_reason"], line["prediction"]) == ("error", "")
            assert line["error"] == f"the adapter is '{name}'; expected one of: zh, law"
            assert f"{rows}:{i + 1}: {line['error']}" in said
        else:
            assert line["prediction"] == alone[name or None][i]["prediction"]
    assert "not read" not in said


def test_rows_without_a_name_get_the_default_one(
    small_dir: Path, rows: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    alone = run(small_dir, rows, tmp_path / "alone", "--adapter", str(folders["law"]))
    given = ["--adapter", str(folders["law"]), f"zh={folders['zh']}"]
    lines = run(small_dir, rows, tmp_path / "out", *given)
    assert [lines[i]["adapter"] for i in (0, 1, 3)] == ["zh", "default", "default"]
    assert [lines[i]["prediction"] for i in (1, 3)] == [alone[i]["prediction"] for i in (1, 3)]


def test_another_column_may_name_them(
    small_dir: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "r.jsonl", [{"content": "a", "task": "zh", "adapter": "x"}])
    column = ("--adapter_column", "task")
    (line,) = run(small_dir, rows, tmp_path / "out", *named(folders, *column))
    assert line["adapter"] == "zh" and line["finish_reason"] != "error"
    with pytest.raises(UserError, match="no row names its adapter in a column tsk; expected"):
        run(small_dir, rows, tmp_path / "o", *named(folders, "--adapter_column", "tsk"))
    with pytest.raises(UserError, match="--adapter_column is given without named adapters"):
        run(small_dir, rows, tmp_path / "o", "--adapter", str(folders["zh"]), *column)


def test_mistakes_are_told_before_anything_is_loaded(
    small_dir: Path, rows: Path, folders: dict[str, Path], full_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("serve.files.sources.load_engine", lambda *_, **__: pytest.fail("loaded"))
    zh = folders["zh"]
    for model, values, message in (
        (small_dir, [f"a={zh}", f"a={folders['law']}"], "two adapters are named a"),
        (small_dir, ["a="], "--adapter is 'a='; expected NAME=DIR"),
        (small_dir, [f"a={zh}", "b=/no/where"], "/no/where: no such folder"),
        (full_dir, [f"a={zh}"], "zh"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run(model, rows, tmp_path / "out", "--adapter", *values)
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_no_adapter_is_overwritten(
    small_dir: Path, rows: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    law = shutil.copytree(folders["law"], tmp_path / "law")
    weights = law / "adapter_model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(UserError, match="adapter_model.safetensors"):
        run(small_dir, rows, weights, *named({**folders, "law": law}, "--overwrite"))
    assert weights.read_bytes() == before


def test_a_resumed_run_mixes_no_adapters(
    small_dir: Path, rows: Path, folders: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = [row for row in read_lines(rows) if row["adapter"] not in ("no", 3)]
    write_rows(rows, whole)
    expected = run(small_dir, rows, tmp_path / "expected", *named(folders))
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted(patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            run(small_dir, rows, output, *named(folders))
    swapped = {"zh": folders["law"], "law": folders["zh"]}
    with pytest.raises(UserError, match="interrupted run with adapters"):
        run(small_dir, rows, output, *named(swapped))
    with pytest.raises(UserError, match="interrupted run with adapter"):
        run(small_dir, rows, output, "--adapter", str(folders["zh"]))
    assert run(small_dir, rows, output, *named(folders)) == expected


def test_an_evaluation_reports_its_adapters_by_name(
    small_dir: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    data = write_rows(
        tmp_path / "d.jsonl", [{"content": "a", "summary": "b", "adapter": n} for n in folders]
    )
    words = ["--model", str(small_dir), "--data", str(data), "--output_dir", str(tmp_path / "e")]
    report = evaluate(parse(EvaluateOptions, "", [*words, *FAST, *named(folders)]))
    assert report is not None
    assert report["adapter"] == {name: str(folder) for name, folder in folders.items()}
    assert len(set(report["adapter_sha256"].values())) == 2
