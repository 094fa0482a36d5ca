"""Predictions of two ranks that are killed at any moment: the same command ends with the same
bytes, and answers no row twice that was on the disk."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve.files.prediction import predict
from serve.options import PredictOptions, parse

ROOT = Path(__file__).parents[2]
ROWS = [{"content": f"类型#裙*第{'长' * (i * 7 % 11)}{i}"} for i in range(200)]
SLOW = ("--max_new_tokens", "40", "--batch_size", "2", "--do_sample", "true", "--seed", "5")


def start(arguments: list[str], rank: int) -> subprocess.Popen[str]:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return subprocess.Popen(
        [sys.executable, "-m", "serve.predict", *arguments], cwd=ROOT, env=os.environ | ranks,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.job
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.soak)])
def test_two_ranks_killed_at_random_end_with_the_same_bytes(
    small_dir: Path, tmp_path: Path, kills: int
) -> None:
    rows, whole, output = (tmp_path / name for name in ("rows.jsonl", "whole", "out"))
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = ["--model", str(small_dir), "--input", str(rows), *SLOW]
    options = parse(PredictOptions, "", [*given, "--output", str(whole)])
    predict(options.model, options.input, whole, options)
    rng, parts = random.Random(kills), tmp_path / "out.parts"
    finished = [0]
    for _ in range(kills):
        processes = [start([*given, "--output", str(output)], rank) for rank in (0, 1)]
        # Some die while they start, others in the middle of a line.
        began, wait = time.monotonic(), rng.uniform(3.0, 6.0)
        while time.monotonic() - began < wait and not output.exists():
            time.sleep(0.02)
        for process in processes:
            process.kill()
            process.wait()
        lines = [file.read_bytes().count(b"\n") for file in parts.glob("rank_*.jsonl")]
        if output.exists():
            break
        assert sum(lines) >= finished[-1], "what was on the disk stays"
        finished.append(sum(lines))
    else:
        end(given, output)
    assert output.read_bytes() == whole.read_bytes()


def end(given: list[str], output: Path) -> None:
    processes = [start([*given, "--output", str(output)], rank) for rank in (0, 1)]
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert not output.with_name(f"{output.name}.parts").exists()
