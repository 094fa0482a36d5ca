"""Waits between tries, by numbers."""

from __future__ import annotations

import pytest

from qwen_ds.errors import Failed
from serve.endpoint.patience import LONGEST_WAIT, MAX_TRIES, Patience, Tries
from serve.endpoint.wire import EndpointRefused, Trouble


def test_waits_grow_to_an_end_and_are_said_once_for_an_outage() -> None:
    told: list[str] = []
    patience = Patience(3600.0, told.append)
    tries = Tries(patience)
    waits = [tries.wait_after(Trouble("down")) for _ in range(20)]
    assert all(0.25 * 2**i <= wait <= 0.5 * 2**i for i, wait in enumerate(waits[:6]))
    assert max(waits) <= LONGEST_WAIT and min(waits[8:]) >= LONGEST_WAIT / 2
    assert told == ["down; trying again for up to 60 min"]
    patience.answered()
    tries.wait_after(Trouble("down again"))
    assert len(told) == 2


def test_what_the_server_says_is_waited_for() -> None:
    assert Tries(Patience(3600.0, lambda _: None)).wait_after(Trouble("x", 77.0)) == 77.0
    assert Tries(Patience(5.0, lambda _: None)).wait_after(Trouble("x", 77.0)) <= 5.0


def test_a_request_is_given_up_alone_only_if_others_are_answered() -> None:
    patience = Patience(3600.0, lambda _: None)
    alone, blamed, busy = Tries(patience), Tries(patience), Tries(patience)
    for _ in range(MAX_TRIES + 3):
        alone.wait_after(Trouble("500", None, True))
    blamed.wait_after(Trouble("500", None, True))
    busy.wait_after(Trouble("503"))
    patience.answered()
    for _ in range(MAX_TRIES - 2):
        blamed.wait_after(Trouble("500", None, True))
    with pytest.raises(EndpointRefused, match="500, 8 times"):
        blamed.wait_after(Trouble("500", None, True))
    for _ in range(MAX_TRIES + 3):
        busy.wait_after(Trouble("503"))


def test_a_silent_server_is_given_up() -> None:
    patience = Patience(0.0, lambda _: None)
    with pytest.raises(Failed, match="down, and nothing else for 0 s"):
        Tries(patience).wait_after(Trouble("down"))
