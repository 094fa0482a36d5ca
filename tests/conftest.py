"""Shared fixtures: golden numbers of the official model, and checkpoint folders made from them."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.jobs import Job, num_workers, run_job

GOLDEN = Path(__file__).parent / "golden"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`, which is what make says."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return num_workers(len(os.sched_getaffinity(0)), memory)


def official_vocabulary() -> Path:
    """The real qwen.tiktoken, carried by the dashscope wheel; located without importing that
    package."""
    files = importlib.metadata.files("dashscope") or []
    (found,) = [f for f in files if f.name == "qwen.tiktoken"]
    return Path(str(found.locate()))


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def vocab_path() -> Path:
    return official_vocabulary()


def _folder(target: Path, source: Path, vocabulary: Path) -> Path:
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    shutil.copy(vocabulary, target / "qwen.tiktoken")
    return target


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden `small` as a checkpoint folder: 512 rows, hidden 64, 3 layers, fp32, own mini
    vocabulary."""
    return _folder(
        tmp_path_factory.mktemp("small"), GOLDEN / "small", GOLDEN / "small" / "mini.tiktoken"
    )


@pytest.fixture(scope="session")
def full_dir(tmp_path_factory: pytest.TempPathFactory, vocab_path: Path) -> Path:
    """Golden `full` as a checkpoint folder: the official 151,936 rows and vocabulary, hidden 8, 2
    layers, bf16."""
    return _folder(tmp_path_factory.mktemp("full"), GOLDEN / "full", vocab_path)


@pytest.fixture(scope="session")
def job() -> Callable[..., Job]:
    return run_job


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 short rows of very different answer lengths, spelled in the mini vocabulary's bytes."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"content": f"colour#{i}", "summary": "abc de " * (1 + i * i % 5) + str(i * 7 % 11)}
        for i in range(100)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def small_job(small_dir: Path, rows_file: Path, tmp_path: Path) -> list[str]:
    """Options of a job on the golden `small` model: fp32, no dropout, 10 steps of 16 rows, three
    micro-batches each. Its attention is set: jobs whose bits are compared must not measure which
    is faster, each for itself."""
    return [
        "--model.path", str(small_dir), "--data.train", str(rows_file),
        "--data.cache_dir", str(tmp_path / "cache"),
        "--model.dtype", "float32", "--model.attention", "sdpa",
        "--lora.dropout", "0", "--batch.rows_per_step", "16",
        "--batch.tokens_per_micro_batch", "400", "--optim.max_steps", "10", "--optim.lr", "1e-3",
    ]  # fmt: skip


@pytest.fixture
def pytests_log_handlers() -> Iterator[None]:
    """For tests of code that sends all log lines to its own file: pytest's handlers come back
    afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
