"""The garbage collector runs between the steps and never within one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from qwen_ds.train.garbage import STEPS_BETWEEN_COLLECTIONS, HeldCollection


class Knot:
    """An object in a cycle."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_cycles_wait_for_a_quiet_point() -> None:
    with HeldCollection() as garbage:
        knot = weakref.ref(Knot())
        assert not gc.isenabled() and knot() is not None
        for _ in range(100_000):  # enough new objects for any number of collections
            _ = [object()]
        garbage.after_step(1, quiet=False)
        assert knot() is not None
        garbage.after_step(2, quiet=True)
        assert knot() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_cycles_do_not_pile_up_in_a_run_without_quiet_points() -> None:
    with HeldCollection() as garbage:
        knot = weakref.ref(Knot())
        for number in range(1, STEPS_BETWEEN_COLLECTIONS + 1):
            assert knot() is not None
            garbage.after_step(number, quiet=False)
        assert knot() is None
