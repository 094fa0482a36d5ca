"""Points where the CPU would wait for a GPU, counted in a process that has none.

The accelerator of DeepSpeed is a CPU's that answers as CUDA's does, so that the code for streams
and events runs; tensors stay in CPU memory. Counted is each operation that on CUDA reads a result
or copies from memory that is not page-locked (memcpy_and_sync of c10/cuda, nonzero of
at::native), and each call that waits by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# item(), bool() and int() of a tensor are _local_scalar_dense. lift_fresh is torch.tensor(...): its
# copy to a GPU comes from ordinary memory.
_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "allclose", "unique",
    "_unique2", "unique_dim", "lift_fresh", "bincount", "histc",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """A mode that counts waits by name, in `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.on_cpu: set[int] = set()
        """Addresses of tensors that are in CPU memory beside a GPU, too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].data_ptr() in self.on_cpu:
            return func(*args)
        if name in _WAITING or (name in _INDEXING and _has_mask(args[1])):
            self.counts[name] += 1
        elif name == "masked_fill_" and isinstance(args[2], Tensor):
            self.counts[name] += 1  # CUDA's takes the value with item()
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        self.counts[name] += 1


def _has_mask(indices: Any) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)


class _Stream:
    """A stream, or an event of one, that notes when it is waited for."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits

    def synchronize(self) -> None:
        self._waits.note("stream.synchronize")

    def query(self) -> bool:
        return True

    def nothing(self, *args: Any) -> None: ...

    record = wait = wait_stream = wait_event = nothing


@contextmanager
def as_on_cuda(waits: Waits) -> Iterator[None]:
    """Let DeepSpeed take the ways that it takes on CUDA, on CPU tensors.

    Enter it before the engine is made: the engine asks for its streams once.
    """
    stream = _Stream(waits)
    answers: dict[str, Any] = {
        "is_synchronized_device": lambda: False, "resolves_data_dependency": lambda: False,
        "synchronize": lambda *a: waits.note("accelerator.synchronize"),
        "Stream": lambda *a, **k: stream, "Event": lambda *a, **k: stream,
        "current_stream": lambda *a: stream, "default_stream": lambda *a: stream,
        "stream": lambda *a: nullcontext(),
    }  # fmt: skip
    # Of a CPU tensor these read memory, or return the tensor itself, without an operation.
    reads = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "cpu")}

    def noting(name: str) -> Any:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            waits.note(name)
            return reads[name](self, *args, **kwargs)

        return read

    accelerator = get_accelerator()
    with (
        patch.multiple(type(accelerator), **{k: staticmethod(v) for k, v in answers.items()}),
        patch.multiple(Tensor, record_stream=lambda *a: None, **{k: noting(k) for k in reads}),
    ):
        yield
