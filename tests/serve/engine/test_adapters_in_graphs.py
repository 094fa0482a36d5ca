"""Adapters in decoding steps that are CUDA graphs: who has which adapter is data of a graph.

The engine is put together as for a GPU, with memory of the CPU and graphs of recorded operations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from qwen_ds.decode.graphs import GraphedModel
from qwen_ds.decode.kv import KVShape
from qwen_ds.decode.kv_pages import PagedStore
from serve.engine import engine as engine_module
from serve.engine.engine import ServingEngine
from serve.engine.loading import load_engine
from tests.decode.recording import Recording, record
from tests.serve.engine.test_adapters import (
    CPU,
    DEFAULT,
    PROMPTS,
    Model,
    alone,
    assert_as_alone,
    folders,
    recorded,
    side_by_side,
)

__all__ = ["alone", "folders", "side_by_side"]  # fixtures


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """The graphs that an engine captures that starts as on a GPU."""
    made: list[Recording] = []

    def store(shape: KVShape, pages: int, page_size: int) -> PagedStore:
        return PagedStore(replace(shape, device=CPU), pages, page_size)

    def capture(work: Callable[[], None]) -> Recording:
        made.append(record(work))
        return made[-1]

    monkeypatch.setattr(engine_module, "PagedStore", store)
    monkeypatch.setattr(engine_module, "GraphedModel", partial(GraphedModel, capture=capture))
    return made


def on_gpu(engine: ServingEngine) -> ServingEngine:
    return replace(engine, shape=replace(engine.shape, device=torch.device("cuda")))


def replays(graphs: list[Recording]) -> int:
    return sum(graph.replays for graph in graphs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("side_by_side")
def test_rows_in_replayed_steps_are_answered_as_each_alone_by_peft(
    small_dir: Path,
    folders: Mapping[str, Path],
    alone: Mapping[str | None, Model],
    graphs: list[Recording],
) -> None:
    engine = on_gpu(load_engine(small_dir, adapters=folders))
    # seq_length is 64: beyond it `alone` would take alpha of a longer prompt at later tokens.
    rows = [(prompt, name) for prompt in PROMPTS[:4] for name in (None, *folders)]
    random.Random(2).shuffle(rows)
    # Rows come and go: a graph meets other adapters, and other numbers of rows, at each replay.
    found = recorded(engine, rows, slots=7)
    for (prompt, name), logits_TV in zip(rows, found, strict=True):
        assert_as_alone(prompt, logits_TV, alone[name])
    # One or two pages; 1, 2, 4 or 8 rows; with adapters or without.
    assert len(graphs) <= 2 * 4 * 2 and replays(graphs) > 2 * len(graphs)


@pytest.mark.filterwarnings("ignore")
def test_steps_of_the_base_alone_replay_no_adapters_work(
    small_dir: Path, folders: Mapping[str, Path], graphs: list[Recording]
) -> None:
    bare = recorded(on_gpu(load_engine(small_dir)), [(PROMPTS[0], None)] * 2)
    (plain,) = graphs
    graphs.clear()
    engine = on_gpu(load_engine(small_dir, adapters={"plain": folders["plain"]}))
    found = recorded(engine, [(PROMPTS[0], None)] * 2)
    (none,) = graphs
    assert all(torch.equal(a, b) for a, b in zip(bare, found, strict=True))
    assert len(none) == len(plain) and none.replays == plain.replays > 0
    graphs.clear()
    recorded(engine, [(PROMPTS[0], None), (PROMPTS[0], "plain")])
    (some,) = graphs
    assert len(some) > len(plain) and some.replays == plain.replays


@pytest.mark.filterwarnings("ignore")
def test_a_default_adapter_acts_in_graphs_too(
    small_dir: Path,
    folders: Mapping[str, Path],
    alone: Mapping[str | None, Model],
    graphs: list[Recording],
) -> None:
    engine = on_gpu(load_engine(small_dir, adapters={DEFAULT: folders["rslora"]}))
    (logits_TV,) = recorded(engine, [(PROMPTS[1], None)])
    assert_as_alone(PROMPTS[1], logits_TV, alone["rslora"])
    assert replays(graphs) > 0
