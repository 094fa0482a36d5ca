"""When an evaluation is due, and which one was the best."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_ds.recipe.options import EvalOptions
from qwen_ds.train.observe.evaluation import BestLoss, Evaluator


def test_the_best_loss_is_kept_and_patience_counts_from_it() -> None:
    best = BestLoss()
    for step, loss in enumerate([3.0, 2.0, float("nan"), 2.0], 1):
        best = best.after(loss, step)
    assert best == BestLoss(2.0, 2, since=2), "an equal loss is no better one, NaN never is"
    assert best.out_of_patience(2) and not best.out_of_patience(3)
    assert not best.out_of_patience(None)


@pytest.mark.parametrize(("every", "due"), [(4, [4, 8, 10]), (None, [5, 10])])
def test_an_evaluation_is_due_every_so_many_steps_and_at_the_end(
    every: int | None, due: list[int]
) -> None:
    """Without a number: after each epoch, here of five steps."""
    nothing: Any = None
    evaluator = Evaluator(nothing, nothing, EvalOptions(every_steps=every), 400, nothing)
    assert [step for step in range(11) if evaluator.due(step, 10, 5)] == due
