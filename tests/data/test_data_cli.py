"""python -m qwen_ds.data encode | inspect; check has tests of its own (doctor/test_command.py)"""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qwen_ds.data import __main__ as command
from qwen_ds.data.rows.token_rows import TokenRows, prepare
from qwen_ds.data.show import show_lengths, show_row
from qwen_ds.errors import UserError
from qwen_ds.model.tokenizer import load_encoding
from qwen_ds.recipe.options import DataOptions

Run = Callable[..., int]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    path = tmp_path / ("a name as long as a line of the terminal is wide " * 2) / "train.jsonl"
    path.parent.mkdir()
    lines = [{"content": f"q{i}<|im_end|>", "summary": f"answer {i}\x1b[31m"} for i in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run(tmp_path: Path, small_dir: Path, train: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(name: str, *options: str) -> int:
        given = [
            "--model.path",
            small_dir,
            "--data.train",
            train,
            "--data.cache_dir",
            tmp_path / "c",
        ]
        monkeypatch.setattr(sys, "argv", ["data", name, *map(str, given), *options])
        return command.main()

    return call


@pytest.fixture
def rows(tmp_path: Path, small_dir: Path, train: Path) -> TokenRows:
    options = DataOptions([str(train)], cache_dir=str(tmp_path / "c"))
    return prepare(options, load_encoding(small_dir), 64).train


def test_encode_writes_one_object_a_row(
    run: Run, rows: TokenRows, tmp_path: Path, train: Path
) -> None:
    assert run("encode", "--output", str(tmp_path / "rows.jsonl")) == 0
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["source"] for row in written] == [f"{train}:{line}" for line in range(1, 6)]
    for found, (ids, labels) in zip(written, (rows[i] for i in range(5)), strict=True):
        assert list(found) == ["input_ids", "labels", "source"]
        assert (found["input_ids"], found["labels"]) == (ids.tolist(), labels.tolist())


def test_encode_without_a_file_writes_rows_and_nothing_else_to_stdout(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data.weights", "2.0", "--data.eval_fraction", "0.4", "--local_rank=0")
    assert run("encode", *options) == 0
    out, err = capsys.readouterr()
    # Each row once, whatever an epoch draws.
    assert len([json.loads(line) for line in out.splitlines()]) == 5
    assert "5 rows of 5 read" in err


def test_options_of_the_recipe_change_the_rows(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for options in ((), ("--data.learn_on", "answer"), ("--data.special_tokens_in_text=parse",)):
        run("encode", *options)
        found.append(json.loads(capsys.readouterr().out.splitlines()[0]))
    assert found[0]["labels"] != found[1]["labels"]
    assert len(found[0]["input_ids"]) > len(found[2]["input_ids"])


def test_an_output_is_not_overwritten_unasked(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    output.write_text("mine")
    with pytest.raises(UserError, match="rows.jsonl: exists; .*--overwrite"):
        run("encode", "--output", str(output))
    assert output.read_text() == "mine"
    assert run("encode", "--output", str(output), "--overwrite") == 0
    assert len(output.read_text().splitlines()) == 5
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_output_in_no_folder_is_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        run("encode", "--output", str(tmp_path / "missing" / "rows.jsonl"))
    assert not (tmp_path / "c").exists()


def test_inspect_shows_rows_lengths_and_counts(
    run: Run, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", "--rows", "2") == 0
    out = capsys.readouterr().out
    assert f"{train}:1" in out and f"{train}:2" in out and f"{train}:3" not in out
    # Learnt tokens stand in brackets where there is no colour.
    assert "⟦assistant\nanswer 0␛[31m<|im_end|><|endoftext|>⟧" in out
    assert "\x1b" not in out, "neither colour nor a row's own control characters"
    assert "row lengths in tokens" in out and "5 rows of 5 read" in out


def test_inspect_finds_a_row_by_its_place(
    run: Run, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", "--at", "train.jsonl:4") == 0
    out = capsys.readouterr().out
    assert f"{train}:4" in out and "answer 3" in out and f"{train}:1" not in out
    with pytest.raises(UserError, match="--at is train.jsonl:99"):
        run("inspect", "--at", "train.jsonl:99")


def test_learnt_and_unlearnt_tokens_differ_in_colour(rows: TokenRows, small_dir: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=200)
    show_row(rows, 0, load_encoding(small_dir), console)
    shown = out.getvalue()
    assert "\x1b[32massistant" in shown and "\x1b[32manswer 0␛[31m" in shown, "learnt: green"
    assert "\x1b[90mq0<|im_end|>" in shown, "not learnt, and no control token: grey, not bold"
    # Control tokens are bold.
    assert "\x1b[1;90m<|im_start|>" in shown and "\x1b[1;32m<|endoftext|>" in shown
    assert "⟦" not in shown


@pytest.mark.parametrize("lens", [[7], [5, 5, 5], list(range(2, 500)), [2, 100_000]])
def test_the_histogram_counts_every_row_once(lens: list[int]) -> None:
    out = io.StringIO()
    show_lengths(np.array(lens, np.int32), Console(file=out, width=100))
    _, *bars, last = out.getvalue().splitlines()
    counts = []
    for line in bars:
        start, end, count = (int(n.replace(",", "")) for n in line.replace("-", " ").split()[:3])
        counts.append(count)
        assert count == sum(start <= n <= end for n in lens)
    assert sum(counts) == len(lens) and 1 <= len(bars) <= 13
    assert start % (end - start + 1) == 0, "round numbers"
    assert last.startswith(f"shortest {min(lens):,}, ") and last.endswith(f"longest {max(lens):,}")


def test_an_unknown_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["data", "decode"])
    with pytest.raises(
        UserError, match="the command is 'decode'; expected encode, inspect or check"
    ):
        command.main()


def test_help_needs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["data", "--help"])
    assert command.main() == 0
    assert "encode" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path,
    small_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = str(tmp_path / "no.jsonl")
    words = ["data", "encode", "--model.path", str(small_dir), "--data.train", missing]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("qwen_ds.data", run_name="__main__")
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ") and "no.jsonl: no such file" in line
