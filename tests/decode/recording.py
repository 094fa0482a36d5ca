"""CUDA graphs, imitated on a CPU: the operations that work did once, done again on the same memory.

Python does not run again at a replay, so whatever it decided or made at the capture stays. What a
capture on a GPU forbids is an error: to look at a tensor's values, shapes that follow from them,
and tensors made from Python's data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.moved import tensors
from tests.waiting import reason_to_wait


class CaptureError(AssertionError):
    """Something that a capture on a GPU forbids."""


class Recording(TorchDispatchMode):
    """A graph: the operations of the work that ran inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._done: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __len__(self) -> int:
        return len(self._done)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (reason := reason_to_wait(func, args, kwargs)) is not None:
            raise CaptureError(f"{func} in a capture: {reason}")
        out = func(*args, **kwargs)
        is_view = any(one.alias_info is not None for one in func._schema.returns)
        made = [] if is_view else tensors(out)
        if func._schema.is_mutable or made:
            self._done.append((func, args, kwargs, made))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made in self._done:
            again = tensors(func(*args, **kwargs))
            for mine, new in zip(made, again if made else [], strict=True):
                mine.copy_(new)


def record(work: Callable[[], None]) -> Recording:
    """Capture work, which has run before."""
    work()
    with Recording() as graph:
        work()
    return graph
