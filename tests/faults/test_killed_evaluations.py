"""Evaluations of three models by two ranks that are killed at any moment: the same command ends
with the same bytes in every file but that of speeds."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from serve.options import EvaluateOptions, parse
from serve.scores.report import evaluate
from tests.export.folders import merge_with
from tests.jobs import ROOT, Job

SPEED = "speed.json"


def rows_of(count: int) -> str:
    rows = [
        {"content": f"类型#裙*第{'长' * (i * 7 % 11)}{i}", "summary": f"第{i}条裙子，简约大方。"}
        for i in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SPEED)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.job
@pytest.mark.parametrize("rows", [60, pytest.param(1070, marks=pytest.mark.soak)])
def test_three_models_killed_three_times_end_with_the_same_bytes(
    small_dir: Path, golden: Path, tmp_path: Path, rows: int
) -> None:
    """Twice in the middle of rows, once while scores are computed or written. Each process has a
    hash seed of its own, so no sum may depend on the order of a set."""
    data, whole, out = tmp_path / "rows.jsonl", tmp_path / "whole", tmp_path / "out"
    data.write_text(rows_of(rows))
    adapter = golden / "lora" / "adapter"
    merge_with(small_dir, [adapter], tmp_path / "merged")
    given = [
        "--compare", f"base={small_dir}", f"tuned={adapter}", str(tmp_path / "merged"),
        "--model", str(small_dir), "--data", str(data), "--max_new_tokens", "12",
        "--batch_size", "4", "--do_sample", "true", "--seed", "5", "--resamples", "200",
    ]  # fmt: skip
    evaluate(parse(EvaluateOptions, "", [*given, "--output_dir", str(whole)]))
    rng = random.Random(rows)

    def finished() -> int:
        parts = out.glob("*/predictions.jsonl.parts/rank_*.jsonl")
        return sum(file.read_bytes().count(b"\n") for file in parts)

    def started() -> Job:
        return Job([*given, "--output_dir", str(out)], 2, ROOT / "serve" / "evaluate.py")

    for moment in (*sorted(rng.sample(range(1, 3 * rows - 40), 2)), None):
        job, last = started(), out / "merged" / "predictions.jsonl"
        if moment is None:
            job.until(last.exists, 400)
        else:
            job.until(lambda moment=moment: finished() >= moment, 400)
        before = finished()
        job.send(signal.SIGKILL).wait()
        assert job.codes[0] == -9, "rank 0 was killed before the evaluation was over"
        assert finished() >= before, "what was on the disk stays"
        assert not (out / "comparison.json").exists()
    assert finished() == 3 * rows
    started().wait().ok()
    assert contents(out) == contents(whole)
    assert sum(path.name == SPEED for path in out.rglob("*")) == 3
    report = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert report["models"] == ["base", "tuned", "merged"] and report["rows"] == rows
