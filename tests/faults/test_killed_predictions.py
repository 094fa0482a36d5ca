"""Predictions of two ranks that are killed at any moment: the same command ends with the same
bytes, and loses no row that was on the disk."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from serve.files.prediction import predict
from serve.options import PredictOptions, parse
from tests.jobs import ROOT, Job

ROWS = [{"content": f"类型#裙*第{'长' * (i * 7 % 11)}{i}"} for i in range(200)]
SLOW = ("--max_new_tokens", "40", "--batch_size", "2", "--do_sample", "true", "--seed", "5")


@pytest.mark.job
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.soak)])
def test_two_ranks_killed_at_random_end_with_the_same_bytes(
    small_dir: Path, tmp_path: Path, kills: int
) -> None:
    """One kill in four comes while the ranks start, the others in the middle of their rows."""
    rows, whole, output = (tmp_path / name for name in ("rows.jsonl", "whole", "out"))
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = ["--model", str(small_dir), "--input", str(rows), *SLOW]
    options = parse(PredictOptions, "", [*given, "--output", str(whole)])
    predict(options.model, options.input, whole, options)
    rng, parts = random.Random(kills), tmp_path / "out.parts"

    def finished() -> int:
        return sum(file.read_bytes().count(b"\n") for file in parts.glob("rank_*.jsonl"))

    def started() -> Job:
        return Job([*given, "--output", str(output)], 2, ROOT / "serve" / "predict.py")

    for kill in range(kills):
        job, before = started(), finished()
        if kill % 4 == 3:
            time.sleep(rng.uniform(0.0, 1.0))
        else:
            enough = before + rng.randrange(1, 100 // kills)
            job.until(lambda enough=enough: finished() >= enough)
        codes = job.send(signal.SIGKILL).wait().codes
        assert codes == [-9, -9], "the prediction was over before it was killed"
        assert finished() >= before, "what was on the disk stays"
    assert 0 < finished() < len(ROWS) and not output.exists()
    started().wait().ok()
    assert output.read_bytes() == whole.read_bytes() and not parts.exists()
