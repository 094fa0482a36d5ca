"""Where a run begins or resumes, after which steps it evaluates, and the room that it needs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen_ds.recipe.options import EvalOptions, OptimOptions, Recipe, SaveOptions
from qwen_ds.train.observe.evaluation import BestLoss
from qwen_ds.train.screen import disk_use
from qwen_ds.train.session import Session
from qwen_ds.train.survive.checkpoint import Checkpoint

nothing: Any = None


def session(
    resumed: Checkpoint | None = None, evaluator: Any = None, every: int | None = None
) -> Session:
    """Ten steps in two epochs."""
    data: Any = SimpleNamespace(sampler=SimpleNamespace(steps_per_epoch=5))
    saver: Any = SimpleNamespace(resumed=resumed)
    observer: Any = SimpleNamespace(progress=SimpleNamespace(state=lambda: {"lines": 3}))
    optim = OptimOptions(lr=1.0, schedule="linear", warmup_steps=0)
    recipe = Recipe(optim=optim, eval=EvalOptions(every_steps=every))
    return Session(recipe, data, nothing, saver, observer, nothing, evaluator, 10)


@pytest.mark.parametrize(("every", "due"), [(4, [4, 8, 10]), (None, [5, 10])])
def test_an_evaluation_is_due_every_so_many_steps_and_at_the_end(
    every: int | None, due: list[int]
) -> None:
    """Without a number: after each epoch. Without evaluation data: never."""
    found = session(evaluator=object(), every=every)
    assert [step for step in range(11) if found.evaluates_after(step)] == due
    assert not any(session().evaluates_after(step) for step in range(11))


def test_a_run_starts_where_its_checkpoint_stopped() -> None:
    assert session().start == (0, BestLoss(), True)
    state = {"step": 6, "best": {"loss": 2.0, "step": 4, "since": 1}, "evaluated": False}
    resumed = session(Checkpoint(Path("step_000006"), state))
    assert resumed.start == (6, BestLoss(2.0, 4, 1), False)
    # A checkpoint of a release that always evaluated first does not say it.
    del state["evaluated"]
    assert resumed.start == (6, BestLoss(2.0, 4, 1), True)


def test_a_state_tells_the_rate_of_the_next_step() -> None:
    state = session().state(5, BestLoss(), evaluated=True)
    assert state.schedule == {"name": "linear", "steps": 10, "next_lr": 0.5}
    assert (state.steps_per_epoch, state.progress) == (5, {"lines": 3})


@pytest.mark.parametrize(
    ("evaluates", "expected"),
    [
        (False, "at most 3 checkpoints of 12.0 GB, 38.0 GB in all"),
        (True, "at most 4 checkpoints of 14.0 GB, 58.0 GB in all"),
    ],
)
def test_the_start_says_how_much_room_full_training_needs(
    tmp_path: Path, evaluates: bool, expected: str
) -> None:
    """A billion parameters: 12 bytes each in a checkpoint, two more where it may be the best, and
    two in the result. One checkpoint more than stay is being written."""
    recipe = Recipe(method="full", save=SaveOptions(every_steps=2, keep=2))
    run: Any = SimpleNamespace(recipe=recipe, dtype=torch.bfloat16, folder=tmp_path)
    count = SimpleNamespace(trainable=10**9, total=10**9)
    model: Any = SimpleNamespace(count=count, adapter_config=None)
    sampler = SimpleNamespace(steps_per_epoch=4)
    data: Any = SimpleNamespace(eval=[0] if evaluates else None, sampler=sampler)
    assert disk_use(run, 100, data, model).startswith(expected)
