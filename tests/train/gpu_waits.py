"""Points where the CPU would wait for a GPU, counted in a process that has none.

The accelerator of DeepSpeed is a CPU's that answers as CUDA's does, so that the code for streams
and events runs; tensors stay in CPU memory. Counted is each operation that waits on CUDA
(tests/waiting.py), and each call that waits by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.waiting import name_of, reason_to_wait


class Waits(TorchDispatchMode):
    """A mode that counts waits by name, in `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if reason_to_wait(func, args, kwargs):
            self.note(name_of(func))
        return func(*args, **kwargs)

    def note(self, name: str) -> None:
        self.counts[name] += 1


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
