"""Learning rates, against values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR

from qwen_ds.recipe.options import OptimOptions
from qwen_ds.train.schedule import dropout_seed, lr_at, total_steps


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533905932737, 0.5, 0.1464466094067263]),
    ],
)
def test_two_steps_of_warm_up_then_the_schedule(schedule: str, expected: list[float]) -> None:
    optim = OptimOptions(lr=1.0, schedule=schedule, warmup_steps=2)  # type: ignore[arg-type]
    assert [lr_at(step, 6, optim) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_that_ends_before_the_run_stays_at_0(schedule: str) -> None:
    optim = OptimOptions(lr=1.0, schedule=schedule, decay_steps=3)  # type: ignore[arg-type]
    whole = OptimOptions(lr=1.0, schedule=schedule)  # type: ignore[arg-type]
    assert [lr_at(step, 9, optim) for step in range(3)] == [lr_at(s, 3, whole) for s in range(3)]
    assert [lr_at(step, 9, optim) for step in range(3, 9)] == [0.0] * 6


def test_decay_is_that_of_deepspeeds_total_num_steps() -> None:
    """After the warm-up; the run itself may be longer or shorter."""
    adamw = torch.optim.AdamW([torch.zeros(1)], lr=0.25)
    theirs = WarmupDecayLR(adamw, 12, warmup_max_lr=0.25, warmup_num_steps=4)
    optim = OptimOptions(lr=0.25, schedule="linear", warmup_steps=4, decay_steps=12)
    for step in range(4, 20):
        theirs.step(step)
        assert lr_at(step, 7, optim) == pytest.approx(theirs.get_last_lr()[0]), step


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(3.0, None, 27), (0.5, None, 5), (0.01, None, 1), (3.0, 4, 4), (1.0, 99, 9)],
)
def test_steps_of_a_run(epochs: float, max_steps: int | None, expected: int) -> None:
    optim = OptimOptions(epochs=epochs, max_steps=max_steps)
    assert total_steps(optim, steps_per_epoch=9) == expected


def test_dropout_seeds_differ_by_position_and_repeat() -> None:
    places = [(s, t, r, m) for s in (1, 2) for t in (0, 1) for r in (0, 1) for m in (0, 1)]
    assert len({dropout_seed(*place) for place in places}) == len(places)
    assert dropout_seed(1, 2, 3, 4) == dropout_seed(1, 2, 3, 4) < 2**63
