"""Where a run begins or resumes, and after which steps it evaluates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_ds.recipe.options import EvalOptions, OptimOptions, Recipe
from qwen_ds.train.observe.evaluation import BestLoss
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
