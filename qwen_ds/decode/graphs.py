"""CUDA graphs of decoding steps: the launches of a whole forward pass, replayed by one call.

With few rows a step is bound by the launches of its thousands of small kernels, not by the GPU. A
graph is captured for each number of rows and of pages that comes up, both rounded up to powers of
two; steps with pieces of prompts run as they are. Which adapter a row has is data of a graph, so
rows of any adapters share one; steps of the bare base alone have their own, without that work.

Shapes: B rows as captured, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qwen_ds.decode.engine import PackedModel, PackedStep, Runs
from qwen_ds.decode.kv_pages import PagedStore
from qwen_ds.decode.paged_attention import StepPages
from qwen_ds.decode.transfers import on_device
from qwen_ds.runlog import say


class Graph(Protocol):
    """A captured piece of work."""

    def replay(self) -> Any: ...


class CudaCapture:
    """Capture work of one device as CUDA graphs.

    They never run at once and leave their results in memory of their own, so they share the rest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device  # not always torch's current one, whose streams would see nothing
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Graph:
        with torch.cuda.device(self._device):
            # The first run chooses kernels and allocates workspaces, which a graph must not do.
            current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                work()
            current.wait_stream(self._stream)
            # Other threads of this process may allocate meanwhile. A capture that fails leaves its
            # stream the current one.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, self._pool, self._stream, "thread_local"),
            ):
                work()
        return graph


class _Kind(NamedTuple):
    """The sizes and the work in which graphs differ."""

    rows: int
    pages: int  # of each row
    is_extended: bool  # by dynamic NTK, in some row
    has_adapters: bool  # in some row


@dataclass(frozen=True, slots=True)
class _Captured:
    step: PackedStep
    pages: StepPages
    graph: Graph
    logits_BV: Tensor


class GraphedModel:
    """A packed model whose decoding steps are replayed, over a store whose last page is kept free
    for the rows that fill up a graph. Logits are those of the latest step only."""

    def __init__(
        self,
        model: PackedModel,
        store: PagedStore,
        most_rows: int,
        adapter_numbers: Callable[[Runs], list[int]] | None = None,
        capture: Callable[[Callable[[], None]], Graph] | None = None,
    ) -> None:
        """
        Args:
            most_rows: of a graph; larger steps are bound by the GPU.
            adapter_numbers: those of the tokens in runs, 0 for the bare base. None: there are no
                adapters.
        """
        self.model, self.store, self.most_rows = model, store, most_rows
        self._adapter_numbers = adapter_numbers
        self._capture = CudaCapture(store.shape.device) if capture is None else capture
        self._captures = True  # until that fails
        self._scratch = store.reserve()
        self._captured: dict[_Kind, _Captured] = {}
        self._logits_BV: Tensor | None = None  # of all graphs

    def __call__(self, step: PackedStep) -> Tensor:
        new, tokens = self.store.pages, step.ids_1N.shape[1]
        # A prompt whose logits are all asked for is one row, not as many as it has tokens.
        if not len(new.counts) == step.due_R.shape[0] == tokens <= self.most_rows:
            return self.model(step)
        numbers = [0] * tokens
        if self._adapter_numbers is not None:
            assert not isinstance(step.adapters, Tensor)
            numbers = self._adapter_numbers(step.adapters)
        kind = _Kind(
            _power_of_two(tokens), _power_of_two(new.table_BP.shape[1]),
            isinstance(step.prompt_lens, Tensor), any(numbers),
        )  # fmt: skip
        captured = self._captured.get(kind) or self._try_capture(kind, new)
        if captured is None:
            return self.model(step)
        self._fill(captured, step, new, numbers)
        captured.graph.replay()
        return captured.logits_BV[:tokens]

    def _try_capture(self, kind: _Kind, new: StepPages) -> _Captured | None:
        """Capture a kind of step, unless that has failed before: memory may lack, or a kernel that
        can be captured. The other graphs stay."""
        if not self._captures:
            return None
        num_keys = self.store.num_keys
        try:
            self._captured[kind] = self._make(kind)
            return self._captured[kind]
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            self._captures = False
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            say(f"no more decoding steps become CUDA graphs, which is slower: {reason}")
            return None
        finally:
            self.store.pages, self.store.num_keys = new, num_keys

    def _make(self, kind: _Kind) -> _Captured:
        """Capture a step of so many rows, all of them in the scratch page."""
        device, size, rows = self.store.shape.device, self.store.page_size, kind.rows
        zeros = torch.zeros(1, rows, dtype=torch.int64, device=device)
        static = PackedStep(
            zeros.clone(), zeros.clone(), zeros.clone() + 1 if kind.is_extended else 0,
            torch.arange(rows, device=device),
            zeros[0].clone() if kind.has_adapters else ((None, rows),), ((None, rows),), self.store,
        )  # fmt: skip
        places = StepPages(
            zeros[0] + self._scratch * size,
            torch.full((rows, kind.pages), self._scratch, dtype=torch.int32, device=device),
            torch.ones(rows, dtype=torch.int32, device=device),
            torch.arange(rows + 1, dtype=torch.int32, device=device),
            (1,) * rows, (1,) * rows,
        )  # fmt: skip
        self.store.pages, self.store.num_keys = places, kind.pages * size
        if self._logits_BV is None:
            most = _power_of_two(self.most_rows)
            self._logits_BV = self.model(static)[:1].repeat(most, 1)
        logits_BV = self._logits_BV[:rows]

        def work() -> None:
            logits_BV.copy_(self.model(static))

        return _Captured(static, places, self._capture(work), logits_BV)

    def _fill(
        self, captured: _Captured, step: PackedStep, new: StepPages, numbers: list[int]
    ) -> None:
        """Put a step into a graph's tensors."""
        rows, pages = new.table_BP.shape
        places, static = captured.pages, captured.step
        for mine, theirs in (
            (static.ids_1N, step.ids_1N),
            (static.positions_1N, step.positions_1N),
        ):
            mine[:, :rows] = theirs
        if isinstance(static.prompt_lens, Tensor):
            static.prompt_lens[:, :rows] = step.prompt_lens
        # Rows that an earlier, larger step has left go back to the scratch page, and to the base.
        if isinstance(static.adapters, Tensor):
            numbers = numbers + [0] * (len(static.adapters) - rows)
            static.adapters.copy_(on_device(numbers, torch.int64, static.adapters.device))
        places.slots_N[:rows], places.slots_N[rows:] = (
            new.slots_N,
            self._scratch * self.store.page_size,
        )
        places.lens_B[:rows], places.lens_B[rows:] = new.lens_B, 1
        places.table_BP[rows:] = self._scratch
        places.table_BP[:rows] = new.table_BP[:, :1]
        places.table_BP[:rows, :pages] = new.table_BP


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
