"""Attention on this GPU, for gpu.py: which kernel runs, and the cost of a length that it has not
met.

Shapes: B rows, H heads, T tokens of a row, W head width; q, k and v are [B, H, T, W].
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

from tests.benchmarks.gpu_answers import Say
from tests.benchmarks.gpu_plan import Plan, Setting
from tests.benchmarks.gpu_profile import activities, kernels, wait

SHORTEST = 33  # of the fresh lengths; those of short questions and answers, up to some hundreds


@contextmanager
def without_cudnn() -> Iterator[None]:
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


MODES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "as torch chooses": contextlib.nullcontext,
    "cuDNN off": without_cudnn,
    "cuDNN alone": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
}


def check_attention(plan: Plan, setting: Setting, device: torch.device, say: Say) -> None:
    """SDPA as training calls it. Each mode gets lengths of its own: plans are kept."""
    qkv = make_qkv(plan, setting.rows, setting.length, device)
    priority = [SDPBackend(number).name for number in torch._C._get_sdp_priority_order()]
    say({"line": "attention", "priority": priority, "chosen": chosen(qkv)})
    lengths = range(SHORTEST, SHORTEST + max(setting.length // 4, 4 * plan.fresh_lengths))
    drawn = random.Random(0).sample(lengths, len(MODES) * plan.fresh_lengths)
    for number, (mode, context) in enumerate(MODES.items()):
        try:
            with context():
                figures = of_fresh(plan, setting.rows, drawn[number :: len(MODES)], device)
        except RuntimeError as error:  # no kernel is left that could do it
            figures = {"remark": str(error).splitlines()[0]}
        say({"line": f"attention, {mode}", **figures})
    longest = longest_kernels(lambda: forward_backward(qkv), device)
    say({"line": "attention, kernels", "longest": longest})


def make_qkv(plan: Plan, rows: int, length: int, device: torch.device) -> tuple[Tensor, ...]:
    """Random q, k and v with the strides that the model gives them."""
    shape = (rows, length, plan.heads, plan.hidden // plan.heads)
    made = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(3))
    return tuple(each.transpose(1, 2).requires_grad_() for each in made)


def forward_backward(qkv: tuple[Tensor, ...]) -> None:
    out = F.scaled_dot_product_attention(*qkv, is_causal=True)
    torch.autograd.grad(out, qkv, out)


def chosen(qkv: tuple[Tensor, ...]) -> str:
    """The kernel that SDPA takes under the present switches."""
    return SDPBackend(torch._fused_sdp_choice(*qkv, None, 0.0, True)).name


def of_fresh(plan: Plan, rows: int, lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Milliseconds, forward and backward, of lengths met for the first and the second time."""
    forward_backward(make_qkv(plan, rows, SHORTEST - 1, device))  # loads libraries
    fresh, again = [], []
    for length in lengths:
        qkv = make_qkv(plan, rows, length, device)
        for times in (fresh, again):
            wait(device)
            began = time.perf_counter()
            forward_backward(qkv)
            wait(device)
            times.append(1000 * (time.perf_counter() - began))
    return {
        "lengths": len(lengths),
        "fresh_ms": statistics.median(fresh),
        "fresh_longest_ms": max(fresh),
        "again_ms": statistics.median(again),
        "chosen": chosen(qkv),
    }


def longest_kernels(run: Callable[[], object], device: torch.device, most: int = 4) -> list[str]:
    """Names and milliseconds of the kernels that take the longest, after a run that warms up; on a
    CPU: of operators."""
    run()
    wait(device)
    with profile(activities=activities(device)) as found:
        run()
        wait(device)
    return [f"{name[:70]} {ms:.3f} ms" for name, ms in kernels(found, device)[:most]]
