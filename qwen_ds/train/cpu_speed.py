"""The faster dtype and the faster attention of this CPU, measured in a fraction of a second.

An x86 with a matrix unit (AMX) multiplies bf16 several times faster than fp32, one without it half
as fast. SDPA's backward pass is slow on short rows in bf16. Both have been otherwise on other CPUs
and with other versions of torch, so nothing is read off the CPU's name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from qwen_ds.model.attention import eager_attention

_TURNS = 5
_TOKENS, _WIDTH, _INNER = 512, 512, 1376  # of the product
_ROWS, _HEADS, _LENGTH, _HEAD_WIDTH = 2, 8, 160, 64  # of attention: short rows, such as ads
# Plain attention must be clearly faster to be chosen over SDPA, which needs less memory.
_CLEARLY = 1.2


def is_bf16_faster() -> bool:
    """Whether a product of matrices takes less time in bf16 than in fp32."""
    in_bf16, in_fp32 = least_seconds([_product(torch.bfloat16), _product(torch.float32)])
    return in_bf16 < in_fp32


def is_eager_faster(dtype: torch.dtype) -> bool:
    """Whether plain products take clearly less time for attention than SDPA, forward and back."""
    eager, sdpa = least_seconds([_attention(dtype, is_eager=True), _attention(dtype)])
    return _CLEARLY * eager < sdpa


def least_seconds(works: Sequence[Callable[[], object]]) -> list[float]:
    """The least time that each of several works takes; they run in turns, after a first time."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(1 + _TURNS):
        for work, its_seconds in zip(works, seconds, strict=True):
            began = time.perf_counter()
            work()
            its_seconds.append(time.perf_counter() - began)
    return [min(its_seconds[1:]) for its_seconds in seconds]


def _product(dtype: torch.dtype) -> Callable[[], object]:
    x, weight = torch.ones(_TOKENS, _WIDTH, dtype=dtype), torch.ones(_INNER, _WIDTH, dtype=dtype)
    return lambda: F.linear(x, weight)


def _attention(dtype: torch.dtype, is_eager: bool = False) -> Callable[[], object]:
    shape = _ROWS, _HEADS, _LENGTH, _HEAD_WIDTH
    q, k, v = (torch.ones(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.ones(shape, dtype=dtype)
    mask = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).tril()

    def run() -> None:
        if is_eager:
            out = eager_attention(q, k, v, mask, 0.0)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), grad)

    return run
