"""The measurement that chooses dtype and attention on a CPU: the least time wins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qwen_ds.train import cpu_speed
from qwen_ds.train.cpu_speed import is_bf16_faster, is_eager_faster, least_seconds


class Clock:
    """A clock that works move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float) -> Callable[[], object]:
        turns = iter(seconds)

        def run() -> None:
            self.now += next(turns)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(cpu_speed.time, "perf_counter", found)
    return found


def test_a_busy_machine_and_the_first_time_do_not_count(clock: Clock) -> None:
    works = [clock.work(0.1, 9, 3, 3, 8, 7), clock.work(9, 4, 5, 4, 9, 9)]
    assert least_seconds(works) == pytest.approx([3, 4])


@pytest.mark.parametrize(("in_bf16", "in_fp32", "faster"), [(1, 7, True), (2, 1, False)])
def test_the_dtype_of_the_faster_product_wins(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, in_bf16: float, in_fp32: float, faster: bool
) -> None:
    seconds = {torch.bfloat16: in_bf16, torch.float32: in_fp32}

    def linear(x: torch.Tensor, weight: torch.Tensor) -> None:
        assert x.dtype == weight.dtype
        clock.now += seconds[x.dtype]

    monkeypatch.setattr(cpu_speed.F, "linear", linear)
    assert is_bf16_faster() == faster


@pytest.mark.parametrize(("eager", "sdpa", "faster"), [(1, 1.7, True), (1, 1.1, False)])
def test_plain_attention_must_be_clearly_faster(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, eager: float, sdpa: float, faster: bool
) -> None:
    def timed(seconds: float) -> Callable[..., torch.Tensor]:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object, **__: object):
            assert q.dtype == torch.bfloat16
            clock.now += seconds
            return q + k + v

        return run

    monkeypatch.setattr(cpu_speed, "eager_attention", timed(eager))
    monkeypatch.setattr(cpu_speed.F, "scaled_dot_product_attention", timed(sdpa))
    assert is_eager_faster(torch.bfloat16) == faster
