"""The ways between Python's data and a device's memory, of which only one waits.

`torch.tensor(data, device=...)` copies from ordinary memory: on a GPU it returns once all that was
asked of it before is done. Copies from pinned memory don't; torch keeps that memory until they have
ended. So a decoding step waits in `read`, once, when its tokens are needed
(tests/decode/test_waits.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def is_apart(device: torch.device) -> bool:
    """Whether a device works beside this process, which to look at its values has to wait."""
    return device.type != "cpu"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's memory on a device."""
    return pinned(tensor).to(device, non_blocking=True) if is_apart(device) else tensor


def on_device(data: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of Python's numbers on a device."""
    return sent(torch.tensor(data, dtype=dtype), device)


def all_on_device(
    lists: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """A tensor for each list of integers, by one copy for all of them."""
    numbers = list(chain.from_iterable(lists))
    return list(on_device(numbers, dtype, device).split([len(numbers) for numbers in lists]))


def read(tensor: Tensor) -> list[Any]:
    """A tensor's values, once the device has them."""
    values: list[Any] = tensor.tolist()
    return values


def pinned(tensor: Tensor) -> Tensor:
    """A copy that a GPU can read by itself."""
    return tensor.pin_memory()
