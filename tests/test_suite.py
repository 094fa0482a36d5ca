"""The suite itself: how many processes it is spread over, and checks that must hold while tests
run beside each other."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import MAX_WORKERS, num_workers, shared_memory, shared_memory_left

GIB = 2**30


@pytest.mark.parametrize(
    ("cores", "gib", "expected"),
    [(1, 64, 1), (2, 16, 2), (64, 1000, MAX_WORKERS), (64, 13, 4), (8, 2, 1)],
)
def test_the_workers_fit_the_cores_and_the_memory(cores: int, gib: int, expected: int) -> None:
    assert num_workers(cores, gib * GIB) == expected


@pytest.fixture
def segment() -> Iterator[Path]:
    path = Path("/dev/shm") / f"qwen_ds_test_{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


def test_shared_memory_that_stays_is_found(segment: Path) -> None:
    before = shared_memory()
    segment.touch()
    assert segment.name in shared_memory_left(before, seconds=0.0)
    assert segment.name not in shared_memory_left(before | {segment.name}, seconds=0.0)


def test_shared_memory_of_a_job_beside_is_waited_for(segment: Path) -> None:
    before = shared_memory()
    segment.touch()

    def end() -> None:
        time.sleep(0.3)
        segment.unlink()

    ending = threading.Thread(target=end)
    ending.start()
    assert segment.name not in shared_memory_left(before)
    ending.join()
