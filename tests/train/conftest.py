"""Whole training jobs as processes, and the small things that they are made of."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """A finished job: the exit code of each rank, and what all of them printed."""

    def __init__(self, codes: list[int], out: str, err: str) -> None:
        self.codes, self.out, self.err = codes, out, err

    def ok(self) -> Job:
        assert set(self.codes) == {0}, f"exit codes {self.codes}\n{self.out[-2000:]}\n{self.err[-4000:]}"
        return self


def run_job(arguments: Sequence[str], ranks: int = 1, timeout: float = 300.0) -> Job:
    """launch/train.py with the variables that a launcher sets; what the deepspeed command adds is tested on its own.

    As the launcher does, the ranks that are left are ended soon after one has failed.
    """
    port = free_port()
    base = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "launch" / "train.py"), *arguments],
                env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
                cwd=ROOT, stdout=out, stderr=err,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        ends = time.monotonic() + timeout
        while any(p.poll() is None for p in processes) and time.monotonic() < ends:
            if any(p.poll() for p in processes):
                ends = min(ends, time.monotonic() + 20)
            time.sleep(0.1)
        for process in processes:
            process.kill()
            process.wait()
        out.seek(0), err.seek(0)
        return Job([p.returncode for p in processes], out.read(), err.read())


@pytest.fixture(scope="session")
def job() -> Callable[..., Job]:
    return run_job


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 short rows of very different answer lengths, spelled in the mini vocabulary's bytes."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"content": f"colour#{i}", "summary": "abc de " * (1 + i * i % 5) + str(i * 7 % 11)} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def small_job(small_dir: Path, rows_file: Path, tmp_path: Path) -> list[str]:
    """Options of a job on the golden `small` model: fp32, no dropout, 10 steps of 16 rows, three micro-batches each."""
    return [
        "--model.path", str(small_dir), "--data.train", str(rows_file), "--data.cache_dir", str(tmp_path / "cache"),
        "--model.dtype", "float32", "--lora.dropout", "0", "--batch.rows_per_step", "16",
        "--batch.tokens_per_micro_batch", "400", "--optim.max_steps", "10", "--optim.lr", "1e-3",
    ]  # fmt: skip
