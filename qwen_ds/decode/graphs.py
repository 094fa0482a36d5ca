"""CUDA graphs of decoding steps: the launches of a whole forward pass, replayed by one call.

With few rows a step is bound by the launches of its thousands of small kernels, not by the GPU. A
graph is captured for each number of rows and of pages that comes up, both rounded up to powers of
two; steps with pieces of prompts, or with adapters, run as they are.

Shapes: B rows as captured, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen_ds.decode.engine import PackedModel, PackedStep
from qwen_ds.decode.kv_pages import PagedStore, StepPages


class Graph(Protocol):
    """A captured piece of work."""

    def replay(self) -> None: ...


def capture(work: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
    """Capture `work` as a CUDA graph, with the tensor that holds its result after each replay."""
    # The first runs choose kernels and allocate workspaces, which must not happen in the graph.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


@dataclass(frozen=True, slots=True)
class _Captured:
    step: PackedStep
    pages: StepPages
    graph: Graph
    logits_BV: Tensor


class GraphedModel:
    """A packed model whose decoding steps are replayed, over a store whose last page is kept free
    for the rows that fill up a graph."""

    def __init__(
        self,
        model: PackedModel,
        store: PagedStore,
        most_rows: int,
        capture: Callable[[Callable[[], Tensor]], tuple[Any, Tensor]] = capture,
    ) -> None:
        self.model, self.store = model, store
        self.most_rows = most_rows  # of a graph; larger steps are bound by the GPU
        self._capture = capture
        self._scratch = store.reserve()
        self._captured: dict[tuple[int, int, bool], _Captured] = {}

    def __call__(self, step: PackedStep) -> Tensor:
        rows = step.due_R.shape[0]
        is_decoding = step.ids_1N.shape[1] == rows
        if not is_decoding or rows > self.most_rows or any(name for name, _ in step.adapters):
            return self.model(step)
        new = self.store.pages
        extended = isinstance(step.prompt_lens, Tensor)
        key = (_power_of_two(rows), _power_of_two(new.table_BP.shape[1]), extended)
        self.store.num_keys = key[1] * self.store.page_size
        if key not in self._captured:
            self._captured[key] = self._make(*key, step)
        captured = self._captured[key]
        self._fill(captured, step, new)
        self.store.pages = captured.pages
        captured.graph.replay()
        return captured.logits_BV[:rows]

    def _make(self, rows: int, pages: int, extended: bool, step: PackedStep) -> _Captured:
        """Capture a step of so many rows, all of them in the scratch page."""
        device, size = self.store.shape.device, self.store.page_size
        zeros = torch.zeros(1, rows, dtype=torch.int64, device=device)
        static = PackedStep(
            zeros.clone(), zeros.clone(), zeros.clone() + 1 if extended else 0,
            torch.arange(rows, device=device), ((None, rows),), self.store,
        )  # fmt: skip
        ones = torch.ones(rows, dtype=torch.int32, device=device)
        places = StepPages(
            zeros[0] + self._scratch * size,
            torch.full((rows, pages), self._scratch, dtype=torch.int32, device=device),
            ones,
            torch.arange(rows + 1, dtype=torch.int32, device=device),
            (1,) * rows,
        )
        self.store.pages = places
        graph, logits_BV = self._capture(lambda: self.model(static))
        return _Captured(static, places, graph, logits_BV)

    def _fill(self, captured: _Captured, step: PackedStep, new: StepPages) -> None:
        rows, pages = new.table_BP.shape
        places, static = captured.pages, captured.step
        for mine, theirs in (
            (static.ids_1N, step.ids_1N),
            (static.positions_1N, step.positions_1N),
        ):
            mine[:, :rows] = theirs
        if isinstance(static.prompt_lens, Tensor):
            static.prompt_lens[:, :rows] = step.prompt_lens
        # Rows that an earlier, larger step has left go back to the scratch page.
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
