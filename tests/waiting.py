"""Operations for which the CPU waits where their tensors are on a GPU, as torch's dispatcher names
them. A capture of a CUDA graph forbids the same ones.

On CUDA they read a result (memcpy_and_sync of c10/cuda), ask how large it is (nonzero of
at::native), or copy from memory that is not page-locked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_VALUES, _SHAPE = "looks at values", "a shape that follows from values"
# item(), bool() and int() of a tensor are _local_scalar_dense; torch.tensor(...) is lift_fresh.
_REASONS = {
    "_local_scalar_dense": _VALUES, "is_nonzero": _VALUES, "equal": _VALUES, "allclose": _VALUES,
    "histc": _VALUES, "bincount": _SHAPE, "nonzero": _SHAPE, "masked_select": _SHAPE,
    "unique": _SHAPE, "_unique2": _SHAPE, "unique_dim": _SHAPE, "repeat_interleave": _SHAPE,
    "lift_fresh": "a tensor of Python's data",
}  # fmt: skip
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


def name_of(func: Any) -> str:
    """An operator's name, without its namespace and overload."""
    return str(func._schema.name.rpartition("::")[2])


def reason_to_wait(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why the CPU waits for a call of an operator, in words; None: it does not."""
    name = name_of(func)
    if name in _INDEXING and any(each is not None and _is_mask(each) for each in args[1]):
        return _SHAPE
    if name == "masked_fill_" and isinstance(args[2], Tensor):
        return _VALUES  # CUDA's takes the value with item()
    if name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return None
    return _REASONS.get(name)


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)
