"""The command itself: several processes, as a launcher starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from serve import predict as command
from serve.files.prediction import predict
from serve.options import PredictOptions, parse

ROWS = [{"content": f"类型#裙*第{'长' * (i * 7 % 11)}{i}"} for i in range(11)]
FAST = ("--max_new_tokens", "6", "--batch_size", "3")


@pytest.mark.job
def test_two_processes_share_the_rows(small_dir: Path, tmp_path: Path) -> None:
    rows, one = tmp_path / "rows.jsonl", tmp_path / "one.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = ["--model", str(small_dir), "--input", str(rows), "--output", str(one), *FAST]
    options = parse(PredictOptions, "", arguments)
    predict(options.model, options.input, one, options)
    output = tmp_path / "shared.jsonl"
    command = [sys.executable, "-m", "serve.predict", "--model", str(small_dir), *FAST]
    command += ["--input", str(rows)]
    processes = [
        subprocess.Popen(
            [*command, f"--output={output}", f"--local_rank={rank}"],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (1, 0)
    ]
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert output.read_bytes() == one.read_bytes()
    assert "11 rows" in texts[1]
    assert texts[0] == ""


@pytest.mark.job
def test_two_processes_write_to_standard_output(small_dir: Path, tmp_path: Path) -> None:
    """The rows and nothing else; one of them twice, the second finds nothing left behind."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [sys.executable, "-m", "serve.predict", "--model", str(small_dir), *FAST]
    command += ["--input", str(rows), "--output", "-"]

    def start(rank: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONIOENCODING": "ascii"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    # Rank 0 waits for nobody, and leaves nothing that would tell a rank 1 that comes after its end.
    processes, ends = [start(1)], time.monotonic() + 120
    while not list((tmp_path / "cache").rglob("*.rank_00001.alive")):
        assert processes[0].poll() is None and time.monotonic() < ends
        time.sleep(0.02)
    processes.append(start(0))
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert ended[0][0] == "" and "11 rows" in ended[1][1]
    lines = [json.loads(line) for line in ended[1][0].splitlines()]
    assert [line["prompt"] for line in lines] == [row["content"] for row in ROWS]
    assert not list((tmp_path / "cache" / "qwen_ds" / "predictions").iterdir())


def test_standard_output_that_a_launcher_writes_to_is_refused(
    small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read or made."""
    for name, value in {
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        "XDG_CACHE_HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    words = ["--model", str(small_dir), "--input", "none.jsonl", "--output", "-"]
    monkeypatch.setattr(sys, "argv", ["serve.predict", *words])
    with pytest.raises(UserError, match="--output is - under the deepspeed launcher, which writes"):
        command.main()
    assert not list(tmp_path.iterdir())
