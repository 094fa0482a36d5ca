"""Operations that wait for a GPU are told from their likes that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.waiting import reason_to_wait

X, MASK, INDEX = torch.ones(4), torch.ones(4, dtype=torch.bool), torch.tensor([2, 0])


class Reasons(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reason := reason_to_wait(func, args, kwargs or {}):
            self.found.append(reason)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda: X[0].item(), "looks at values"),
        (lambda: bool(MASK.all()), "looks at values"),
        (lambda: X.clone().masked_fill_(MASK, X[0]), "looks at values"),
        (lambda: X[MASK], "a shape that follows from values"),
        (lambda: X.clone().index_put_((MASK,), X), "a shape that follows from values"),
        (lambda: X.repeat_interleave(INDEX.new_ones(4)), "a shape that follows from values"),
        (lambda: torch.tensor([1.0]), "a tensor of Python's data"),
        (lambda: X[INDEX], None),
        (lambda: MASK.clone().index_put_((INDEX,), MASK[:2]), None),
        (lambda: X.clone().masked_fill_(MASK, 2.0), None),
        (lambda: torch.where(MASK, X, 0.0), None),
        (lambda: X.repeat_interleave(INDEX.new_ones(4), output_size=4), None),
    ],
)
def test_what_waits_has_a_reason(work: Callable[[], Tensor], reason: str | None) -> None:
    with Reasons() as reasons:
        work()
    assert set(reasons.found) == ({reason} if reason else set())
