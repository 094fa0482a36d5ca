"""A rank that is gone is noticed, whether it ever came or not; a slow one is not taken for dead."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_ds.disk.lock import Holder
from qwen_ds.errors import Failed
from serve.files import ranks
from serve.files.claims import Claims
from serve.files.ranks import (
    ABSENT_SECONDS,
    BEAT_SECONDS,
    LOOK_SECONDS,
    SILENT_SECONDS,
    Leader,
    RankWatch,
    SignOfLife,
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(ranks, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(ranks, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(ranks, "ABSENT_SECONDS", 2.0)


def until(holds: Callable[[], object]) -> None:
    ends = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_the_waits_fit_into_a_minute() -> None:
    assert 5 * BEAT_SECONDS < SILENT_SECONDS < 60 - LOOK_SECONDS
    assert SILENT_SECONDS < ABSENT_SECONDS <= 60


def test_a_rank_that_falls_silent_is_gone_and_named(tmp_path: Path) -> None:
    watch = RankWatch(tmp_path / "out", 3)
    beats = [
        SignOfLife(tmp_path / "out", 1, Holder.this_process()),
        SignOfLife(tmp_path / "out", 2, Holder.this_process()),
    ]
    until(lambda: all(came for _, _, came in watch._seen.values()))
    beats[0]._done.set()  # as a kill would stop it
    until(watch.gone)
    assert list(watch.gone()) == [1], "the other one beats"
    assert f"process {os.getpid()} on {os.uname().nodename}" in watch.gone()[1]
    beats[1].stop()
    watch.stop()


def test_a_rank_that_never_came_is_gone_later(tmp_path: Path) -> None:
    """The file of a killed run is no sign of life."""
    (tmp_path / ".out.rank_00001.alive").write_text("{")
    began = time.monotonic()
    watch = RankWatch(tmp_path / "out", 3)
    until(lambda: len(watch.gone()) == 2)
    assert time.monotonic() - began >= 2.0
    assert watch.gone()[2].startswith("rank 2 has given no sign of life for ")
    watch.stop()


def test_a_rank_that_comes_back_is_not_gone(tmp_path: Path) -> None:
    watch = RankWatch(tmp_path / "out", 2)
    until(watch.gone)
    assert list(watch.gone()) == [1]
    beat = SignOfLife(tmp_path / "out", 1, Holder.this_process())
    until(lambda: not watch.gone())
    time.sleep(5 * ranks.LOOK_SECONDS)  # the watch looks again, several times
    assert watch.gone() == {}
    beat.stop()
    watch.stop()


def test_a_file_that_another_run_took_comes_back(tmp_path: Path) -> None:
    beat = SignOfLife(tmp_path / "out", 1, Holder.this_process())
    file = tmp_path / ".out.rank_00001.alive"
    file.unlink()
    until(file.is_file)
    beat.stop()
    assert not file.exists()


def test_the_end_waits_for_ranks_that_come_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One comes late, one has come and gone between two looks, one is dead."""
    said: list[str] = []
    monkeypatch.setattr(ranks, "say", said.append)
    monkeypatch.setattr(ranks, "ABSENT_SECONDS", 30.0)
    beat = SignOfLife(tmp_path / "out", 3, Holder.this_process())
    watch = RankWatch(tmp_path / "out", 4)
    until(lambda: watch._seen[3][2])
    beat._done.set()  # as a kill would stop it
    with ThreadPoolExecutor() as pool:
        end = pool.submit(watch.wait_for_ends, lambda rank: rank == 2)
        until(lambda: said)
        late = SignOfLife(tmp_path / "out", 1, Holder.this_process())
        until(lambda: watch._seen[1][2])
        until(watch.gone)
        assert not end.done() and "waiting for rank 1" in said[0]
        late.stop()
        end.result(timeout=30)
    watch.stop()


def test_the_end_does_not_wait_for_ever(tmp_path: Path) -> None:
    beat = SignOfLife(tmp_path / "out", 1, Holder.this_process())
    watch = RankWatch(tmp_path / "out", 2)
    watch.wait_for_ends(lambda rank: True)
    assert watch.gone() == {}
    beat.stop()
    watch.stop()


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Take the place of a rank of two."""
    monkeypatch.setattr(ranks.dist, "world_size", lambda: 2)
    return lambda rank: monkeypatch.setattr(ranks.dist, "rank", lambda: rank)


def came(output: Path, first: Holder) -> None:
    """Let rank 0 begin on an output."""
    folder = output.with_name(f"{output.name}.parts")
    folder.mkdir(exist_ok=True)
    Claims(folder, 0, first, 1, 1, lambda rank: None)


def test_a_rank_waits_for_the_first_longer_than_for_a_sign_beside_an_output(
    tmp_path: Path, as_rank: Callable[[int], None]
) -> None:
    outputs, last, own = [tmp_path / "a", tmp_path / "b"], tmp_path / "last", Holder.this_process()
    own = replace(own, since=f"later than {own.since}")  # each sign has its own time
    left = replace(own, since="2001-01-01 00:00:00")
    came(outputs[1], left)  # in a killed run
    as_rank(0)
    with Leader(last, outputs) as leader:
        leader.wait_for(outputs[1])  # itself it waits for nobody
        came(outputs[0], own)
        as_rank(1)
        with Leader(last, outputs) as other, ThreadPoolExecutor() as threads:
            other.wait_for(outputs[0])
            waiting = threads.submit(other.wait_for, outputs[1])
            time.sleep(1.5 * ranks.ABSENT_SECONDS)
            assert not waiting.done(), "rank 0 is at work on the output before"
            came(outputs[1], own)
            waiting.result(timeout=30)
        as_rank(0)


def test_a_rank_does_not_wait_for_a_first_that_is_gone(
    tmp_path: Path, as_rank: Callable[[int], None]
) -> None:
    as_rank(1)
    with (
        Leader(tmp_path / "last", [tmp_path / "a"]) as leader,
        pytest.raises(Failed, match="rank 0 has given no sign of life .* not begun on .*a; see"),
    ):
        leader.wait_for(tmp_path / "a")
