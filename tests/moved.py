"""Launches of operations, and the bytes that they move: of eager code by a dispatch mode on any
device, of compiled code from inductor's schedule.

Products and attention are counted as launches, but not as bytes moved: their time is that of the
arithmetic. Every other operation moves what it reads and writes. Views are neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.scheduler import ExternKernelSchedulerNode, Scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.waiting import name_of

# Operations that allocate or describe a tensor and launch nothing.
_SILENT = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "device",
    "unsafe_view",
)  # fmt: skip


class Moved(TorchDispatchMode):
    """Launches and bytes of the operations that run inside, by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = name_of(func)
        if not func.is_view and name.lstrip("_") not in _SILENT:
            self.note(name, (args, kwargs), out)
        return out

    def note(self, name: str, inputs: object, outputs: object) -> None:
        """Count one operation; also for what runs outside of torch's dispatcher."""
        self.launches[name] += 1
        is_product = name.rstrip("_").endswith("mm") or "attention" in name or "attn" in name
        if not is_product:
            self.bytes[name] += _nbytes(inputs) + _nbytes(outputs)

    def clear(self) -> None:
        self.launches.clear()
        self.bytes.clear()


@dataclass
class Fused:
    """Bytes that the kernels of inductor's own read and write, for the shapes that it compiles for;
    products and attention are not its own."""

    bytes: int = 0


@contextmanager
def fused() -> Iterator[Fused]:
    """Count all that is compiled inside, and take nothing from a cache."""
    found, make_code = Fused(), Scheduler.codegen

    def counting(scheduler: Scheduler) -> None:
        own = (n for n in scheduler.nodes if not isinstance(n, ExternKernelSchedulerNode))
        found.bytes += sum(node.get_read_write_buffers_sizes() for node in own)
        make_code(scheduler)

    with (
        mock.patch.object(Scheduler, "codegen", counting),
        inductor.patch(fx_graph_cache=False),
        functorch.patch(enable_autograd_cache=False),
    ):
        yield found


def tensors(tree: object) -> list[Tensor]:
    """The different tensors in a tree of arguments or results."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _nbytes(tree: object) -> int:
    """Bytes of all tensors; a broadcast one counts what it stores."""
    return sum(_stored(tensor) for tensor in tensors(tree))


def _stored(tensor: Tensor) -> int:
    sizes = [n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s]
    return int(torch.Size(sizes).numel()) * tensor.itemsize
