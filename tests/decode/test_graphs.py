"""Decoding steps as captured graphs, with the capture itself spelled out: the same work on the same
buffers, run anew at each replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_ds.decode.engine import DecodingEngine, packed
from qwen_ds.decode.graphs import GraphedModel
from qwen_ds.decode.kv_pages import PagedStore
from qwen_ds.decode.scheduler import EngineLimits
from tests.decode.test_engine import answers, cases, expected, make_engine, model, prompts

__all__ = ["cases", "expected", "model", "prompts"]  # fixtures


@dataclass
class Replayed:
    """A graph whose replay runs the work again, into the same result."""

    work: Callable[[], Tensor]
    result: Tensor
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.result.copy_(self.work())


def graphed(engine: DecodingEngine, most_rows: int) -> list[Replayed]:
    """Put graphs before an engine's model; those that it will capture."""
    captured: list[Replayed] = []

    def capture(work: Callable[[], Tensor]) -> tuple[Replayed, Tensor]:
        result = work()
        captured.append(Replayed(work, result))
        return captured[-1], result

    assert isinstance(engine.store, PagedStore)
    engine.model = GraphedModel(engine.model, engine.store, most_rows, capture)
    return captured


def test_replayed_steps_give_the_same_tokens(model, prompts, expected) -> None:
    engine = make_engine(model, PagedStore, limits=EngineLimits(8, 400, 1000))
    captured = graphed(engine, most_rows=8)
    assert answers(engine, prompts[:24]) == expected[:24]
    assert sum(graph.replays for graph in captured) > 20
    # Few graphs: numbers of rows and pages are rounded up.
    assert len(captured) < 20
    assert engine.store.available_pages == engine.store.num_pages == 499


def test_a_row_that_went_wrong_leaves_nothing_in_a_graph(model, prompts, expected) -> None:
    engine = make_engine(model, PagedStore, limits=EngineLimits(8, 400, 1000))
    captured = graphed(engine, most_rows=8)
    store = engine.store
    assert isinstance(store, PagedStore)
    # Four pages a row; then three, in the graph that still names four.
    first = [i for i, prompt in enumerate(prompts) if 16 <= len(prompt) < 24][:8]
    assert answers(engine, [prompts[i] for i in first]) == [expected[i] for i in first]
    replays = sum(graph.replays for graph in captured)
    assert isinstance(engine.model, GraphedModel)
    store._pool[:, :, [i for i in range(500) if i != engine.model._scratch]] = torch.nan
    short = [i for i, prompt in enumerate(prompts) if len(prompt) < 8][
        :8
    ]  # nothing of them is shared
    found = answers(engine, [prompts[i] for i in short])
    assert found == [expected[i] for i in short]
    assert sum(graph.replays for graph in captured) > replays


def test_larger_steps_run_as_they_are(model, prompts, expected) -> None:
    engine = make_engine(model, PagedStore, limits=EngineLimits(8, 400, 1000))
    captured = graphed(engine, most_rows=0)
    assert answers(engine, prompts[:8]) == expected[:8]
    assert captured == []
    assert packed(model) is not engine.model
