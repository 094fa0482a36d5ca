"""The watchdog's verdicts, from beats in a dictionary that plays the store and a clock that the
test moves."""

from __future__ import annotations

from collections.abc import Callable
from time import sleep as real_sleep

import pytest

from qwen_ds import dist
from qwen_ds.train.survive import watchdog
from qwen_ds.train.survive.watchdog import SILENT_SECONDS, Watchdog

Clock = Callable[[float], None]


class Store:
    """The few calls of torch's store that the watchdog makes."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.broken = False

    def set(self, key: str, value: str) -> None:
        if self.broken:
            raise RuntimeError("connection reset")
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        if self.broken:
            raise RuntimeError("connection reset")
        return all(key in self.values for key in keys)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(watchdog.time, "sleep", sleep)
    return sleep


@pytest.fixture
def ranks(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[Watchdog]:
    made = []
    for rank in range(3):
        monkeypatch.setattr(dist, "world_size", lambda: 3)
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        one = Watchdog(10, launched=False)
        one._store = store
        one._post()
        made.append(one)
    return made


def post(ranks: list[Watchdog]) -> None:
    for one in ranks:
        one._post()


def test_ranks_that_move_are_left_alone(ranks: list[Watchdog], clock: Clock) -> None:
    for step in range(100):
        for one in ranks:
            one.at(step, "micro-batch 1")
        post(ranks)
        clock(20)
        assert ranks[0]._judge() is None


def test_a_silent_rank_is_dead_and_the_others_hear_of_it(
    ranks: list[Watchdog], clock: Clock
) -> None:
    ranks[2].at(7, "micro-batch 3 of 4")
    post(ranks)
    assert ranks[0]._judge() is None
    for _ in range(int(SILENT_SECONDS) + 2):
        clock(1)
        post(ranks[:2])
    verdict = ranks[0]._judge() or ""
    assert verdict.startswith("rank 2 on ") and "step 7 (micro-batch 3 of 4)" in verdict
    assert ranks[1]._verdict() == verdict


def test_rank_0_that_stands_still_while_its_store_answers_is_dead(
    ranks: list[Watchdog], clock: Clock
) -> None:
    """The store has threads of its own; those of Python stop where a call keeps the interpreter."""
    ranks[0].at(3, "micro-batch 1")
    post(ranks)
    assert ranks[2]._verdict() is None
    clock(SILENT_SECONDS + 1)
    post(ranks[1:])
    verdict = ranks[2]._verdict()
    assert verdict and verdict.startswith("rank 0") and "at step 3 (micro-batch 1)" in verdict
    post(ranks[:1])
    assert ranks[2]._verdict() is None


def test_a_stuck_step_names_the_rank_that_is_behind(ranks: list[Watchdog], clock: Clock) -> None:
    for one in ranks:
        one.at(5, "reading the batch")
    for one in (ranks[0], ranks[2]):
        one.at(5, "micro-batch 1 of 2")
    for _ in range(600):  # distributed.timeout_minutes is 10
        post(ranks)
        assert ranks[0]._judge() is None
        clock(1)
    post(ranks)
    verdict = ranks[0]._judge() or ""
    assert "rank 1 on " in verdict and "is behind, at step 5 (reading the batch)" in verdict


def test_standing_still_outside_the_steps_is_no_fault(ranks: list[Watchdog], clock: Clock) -> None:
    for one in ranks:
        one.at(5, "saving")
        one.idle()
    for _ in range(30):
        post(ranks)
        clock(60)
        assert ranks[0]._judge() is None


def test_a_rank_that_gets_on_within_its_place_is_not_stuck(
    ranks: list[Watchdog], clock: Clock
) -> None:
    for one in ranks:
        one.at(5, "saving")
    for _ in range(60):
        ranks[0].touch()
        post(ranks)
        clock(30)
        assert ranks[0]._judge() is None


def test_a_rank_that_waits_for_a_disk_is_not_stuck(ranks: list[Watchdog]) -> None:
    """The action runs in a thread of its own until the watchdog has been touched twice."""
    ranks[0].at(5, "saving")

    def write() -> str:
        while ranks[0]._own.touches < 2:
            real_sleep(0.01)
        return "sha256"

    assert ranks[0].touch_during(write) == "sha256"

    def full() -> str:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        ranks[0].touch_during(full)


def test_an_error_of_the_network_is_blamed_on_the_peer_that_failed(
    ranks: list[Watchdog], clock: Clock
) -> None:
    assert ranks[1].blame(MemoryError("no room")) is None, "its own error: nobody else is to blame"
    blamed = ranks[0].blame(RuntimeError("[gloo] Connection closed by peer"))
    assert blamed is not None and blamed.startswith("rank 1 ") and "MemoryError: no room" in blamed


def test_without_the_store_rank_0_is_to_blame(
    ranks: list[Watchdog], store: Store, clock: Clock
) -> None:
    ranks[1]._verdict()
    store.broken = True
    blamed = ranks[1].blame(RuntimeError("Connection reset by peer"))
    assert blamed is not None and blamed.startswith("rank 0 ")
