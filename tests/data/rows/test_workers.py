"""The pool that encodes: equal rows in equal order, and processes that end with their parent."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.data.rows import workers
from qwen_ds.data.rows.blocks import Block, encode_block
from qwen_ds.data.rows.data_report import PartReport
from qwen_ds.data.rows.encode import EncodeOptions
from qwen_ds.data.rows.row_file import RowWriter
from qwen_ds.data.rows.token_rows import prepare
from qwen_ds.data.rows.workers import Submit, encode_all, encoding_pool
from qwen_ds.model.chatml import Conversation, Turn
from qwen_ds.model.tokenizer import load_encoding
from qwen_ds.recipe.options import DataOptions

ROOT = Path(__file__).parents[3]
TALK = Conversation(None, (Turn("user", "q\ud800"), Turn("assistant", "a\x00")))


def handed_over(submit: Submit, talks: list[Conversation]) -> Future[Block]:
    """The result of the first call that finds a process up."""
    deadline = time.monotonic() + 120
    while (future := submit(talks)) is None:
        assert time.monotonic() < deadline, "no process came up"
        time.sleep(0.05)
    return future


def test_workers_give_the_same_rows_in_the_same_order(
    tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"content": f"类型#裙*{i}", "summary": "好看" * (1 + i % 5) + str(i)} for i in range(300)
    ]
    rows.insert(150, {"content": "x", "summary": ""})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataOptions(train=[str(file)], max_answer_tokens=20, max_prompt_tokens=30)

    alone = prepare(
        replace(data, cache_dir=str(tmp_path / "alone")), load_encoding(small_dir), 64
    ).train
    plain, given = workers.encoding_pool, []

    @contextlib.contextmanager
    def patient(*args: Any) -> Iterator[Submit]:
        with plain(*args) as submit:
            yield lambda talks: given.append(len(talks)) or handed_over(submit, talks)

    monkeypatch.setattr(workers, "encoding_pool", patient)
    monkeypatch.setattr(workers, "CHUNK_ROWS", 16)
    monkeypatch.setattr(workers, "INLINE_ROWS", 32)
    monkeypatch.setattr(workers, "default_workers", lambda: 2)
    together = prepare(
        replace(data, cache_dir=str(tmp_path / "together")), load_encoding(small_dir), 64
    ).train

    assert len(given) > 4, "chunks that the pool encoded"
    assert together.sha256 == alone.sha256
    assert [together.source(i) for i in range(300)] == [alone.source(i) for i in range(300)]
    assert {**together.report, "cache": ""} == {**alone.report, "cache": ""}
    assert together.report["answers_cut"] > 0


def test_any_text_survives_the_way_between_processes(small_dir: Path) -> None:
    with encoding_pool(load_encoding(small_dir), EncodeOptions("answer"), 1) as submit:
        block = handed_over(submit, [TALK]).result(timeout=60)
    here = encode_block(load_encoding(small_dir), [TALK], EncodeOptions("answer"))
    assert block.ids_N.tolist() == here.ids_N.tolist()
    assert block.content_K.tolist() == here.content_K.tolist()


def test_a_dead_worker_is_an_error_and_not_a_hang(small_dir: Path) -> None:
    with encoding_pool(load_encoding(small_dir), EncodeOptions(), 1) as submit:
        handed_over(submit, [TALK]).result(timeout=60)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(BrokenProcessPool):
            handed_over(submit, [TALK]).result(timeout=60)


class Unloadable:
    """Pickles, and cannot be loaded in the worker."""

    def __reduce__(self) -> tuple[object, ...]:
        return load_encoding, ("/no/such/file",)


def test_a_worker_that_cannot_start_is_an_error_and_not_a_hang() -> None:
    broken: Any = Unloadable()
    with (
        encoding_pool(broken, EncodeOptions(), 1) as submit,
        pytest.raises(BrokenProcessPool),
    ):
        handed_over(submit, [TALK]).result(timeout=60)


def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CHUNK_ROWS", 10)
    asked, done, most = 0, 0, 0

    def stream() -> Iterator[tuple[Conversation, str]]:
        nonlocal asked, most
        for i in range(500):
            asked += 1
            most = max(most, asked - done)
            yield Conversation(None, (Turn("user", str(i)), Turn("assistant", str(i)))), f"x:{i}"

    def on_rows(n: int) -> None:
        nonlocal done
        done += n

    report = PartReport("x")
    with RowWriter(tmp_path / "x") as rows:
        encode_all([(report, stream())], rows, load_encoding(small_dir), EncodeOptions(), on_rows)
    assert (report.kept, done) == (500, 500)
    assert most <= 20, "rows under way"


PROGRAM = """
import signal, sys, time
from pathlib import Path
from qwen_ds.data.rows.encode import EncodeOptions
from qwen_ds.data.rows.workers import encoding_pool
from qwen_ds.model.chatml import Conversation, Turn
from qwen_ds.model.tokenizer import load_encoding

# A shell starts its background jobs with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
print("started", flush=True)
talks = [Conversation(None, (Turn("user", "q" * 9), Turn("assistant", "a" * 999)))] * 500
with encoding_pool(load_encoding(Path(sys.argv[1])), EncodeOptions(), 2) as submit:
    while (first := submit(talks)) is None:
        time.sleep(0.05)
    futures = [submit(talks) for _ in range(int(sys.argv[2]))]
    first.result()
    print("encoding", flush=True)
    for future in futures:
        future.result()
    if not futures:
        time.sleep(120)  # with idle workers
"""


@contextlib.contextmanager
def running(small_dir: Path, chunks: int) -> Iterator[subprocess.Popen[str]]:
    """PROGRAM in a session of its own, which has no `if __name__ == "__main__"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(small_dir), str(chunks)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for found in process.stdout:
        if found.strip() == line:
            return
    raise AssertionError(f"ended without {line!r}")


def members(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def wait_until_alone(session: int) -> None:
    deadline = time.monotonic() + 20
    while left := members(session):
        assert time.monotonic() < deadline, f"processes are left: {left}"
        time.sleep(0.1)


def test_no_process_outlives_a_killed_parent(small_dir: Path) -> None:
    with running(small_dir, 10_000) as process:
        wait_for(process, "encoding")
        assert len(members(process.pid)) > 3, "itself, the fork server and two workers at least"
        process.kill()
        wait_until_alone(process.pid)


@pytest.mark.parametrize("chunks", [0, 10_000], ids=["idle", "encoding"])
def test_ctrl_c_ends_the_pool_and_the_parent_alone_says_so(small_dir: Path, chunks: int) -> None:
    with running(small_dir, chunks) as process:
        wait_for(process, "encoding")
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert errors.count("Traceback") == 1 and "KeyboardInterrupt" in errors
        wait_until_alone(process.pid)


def test_the_launch_script_is_not_run_again(small_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(script), str(small_dir), "4"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (0, "started\nencoding\n"), done.stderr
