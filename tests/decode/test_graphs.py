"""Decoding steps as captured graphs, imitated by recorded operations (see recording.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from qwen_ds.decode import kv_pages, paged_attention
from qwen_ds.decode.engine import DecodingEngine, PackedStep
from qwen_ds.decode.graphs import CudaCapture, Graph, GraphedModel
from qwen_ds.decode.kv_pages import PagedStore
from qwen_ds.decode.request import Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.scheduler import EngineLimits
from qwen_ds.decode.stop import StopRule
from tests.decode.recording import CaptureError, Recording, record
from tests.decode.test_engine import answers, cases, expected, make_engine, model, prompts
from tests.decode.test_kv_rows import flash_by_hand

__all__ = ["cases", "expected", "model", "prompts"]  # fixtures

LIMITS = EngineLimits(8, 400, 1000)


def graphed(engine: DecodingEngine, most_rows: int) -> list[Recording]:
    """Put graphs before an engine's model; those that it will capture."""
    captured: list[Recording] = []

    def capture(work: Callable[[], None]) -> Recording:
        captured.append(record(work))
        return captured[-1]

    assert isinstance(engine.store, PagedStore)
    engine.model = GraphedModel(engine.model, engine.store, most_rows, capture=capture)
    return captured


def test_replayed_steps_give_the_same_tokens(model, prompts, expected) -> None:
    engine = make_engine(model, PagedStore, limits=LIMITS)
    captured = graphed(engine, most_rows=8)
    assert answers(engine, prompts[:24]) == expected[:24]
    assert sum(graph.replays for graph in captured) > 20
    # Few graphs: numbers of rows and pages are rounded up.
    assert len(captured) < 20
    assert engine.store.available_pages == engine.store.num_pages == 499


def test_pages_are_read_one_by_one_in_replayed_steps(
    model, prompts, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_attention, "flash_forward", flash_by_hand)
    monkeypatch.setattr(kv_pages, "choose_reading", lambda *_: "pages")
    engine = make_engine(model, PagedStore, limits=LIMITS)
    captured = graphed(engine, most_rows=8)
    assert answers(engine, prompts[:16]) == expected[:16]
    assert sum(graph.replays for graph in captured) > 20


def test_a_row_that_went_wrong_leaves_nothing_in_a_graph(model, prompts, expected) -> None:
    engine = make_engine(model, PagedStore, limits=LIMITS)
    captured = graphed(engine, most_rows=8)
    store = engine.store
    assert isinstance(store, PagedStore)
    # Four pages a row; then three, in the graph that still names four.
    first = [i for i, prompt in enumerate(prompts) if 16 <= len(prompt) < 24][:8]
    assert answers(engine, [prompts[i] for i in first]) == [expected[i] for i in first]
    replays = sum(graph.replays for graph in captured)
    assert isinstance(engine.model, GraphedModel)
    store._pool[:, :, [i for i in range(500) if i != engine.model._scratch]] = torch.nan
    # Nothing of these is shared.
    short = [i for i, prompt in enumerate(prompts) if len(prompt) < 8][:8]
    found = answers(engine, [prompts[i] for i in short])
    assert found == [expected[i] for i in short]
    assert sum(graph.replays for graph in captured) > replays


def test_larger_steps_run_as_they_are(model, prompts, expected) -> None:
    engine = make_engine(model, PagedStore, limits=LIMITS)
    captured = graphed(engine, most_rows=0)
    assert answers(engine, prompts[:8]) == expected[:8]
    assert captured == []


def test_a_prompt_whose_logits_are_all_asked_for_is_no_decoding_step(model, prompts) -> None:
    prompt = next(prompt for prompt in prompts if len(prompt) == 3)
    sampling = SamplingParams(max_new_tokens=4, prompt_logprobs=1)
    found = []
    for is_graphed in (False, True):
        engine = make_engine(model, PagedStore, limits=LIMITS)
        captured = graphed(engine, most_rows=8) if is_graphed else []
        engine.submit(Request(prompt, sampling, StopRule()))
        updates = [update for _ in range(4) for update in engine.step()]
        found.append(([update.token for update in updates], updates[0].prompt))
    assert found[0] == found[1]
    assert captured


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory\nat all"), RuntimeError("no")])
def test_steps_that_cannot_be_captured_run_as_they_are_and_that_is_said_once(
    model, prompts, expected, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    engine = make_engine(model, PagedStore, limits=LIMITS)
    store, captured = engine.store, list[Recording]()

    def capture(work: Callable[[], None]) -> Graph:
        if captured:
            raise error
        captured.append(record(work))
        return captured[-1]

    assert isinstance(store, PagedStore)
    engine.model = GraphedModel(engine.model, store, 8, capture=capture)
    for rows in (8, 1, 2, 8):
        assert answers(engine, prompts[:rows]) == expected[:rows]
    assert captured[0].replays > 20  # those of before stay
    reason = str(error).splitlines()[0]
    assert capsys.readouterr().out == (
        f"no more decoding steps become CUDA graphs, which is slower: {reason}\n"
    )


def test_logits_lie_in_memory_that_all_graphs_share(model, prompts) -> None:
    engine = make_engine(model, PagedStore, limits=LIMITS)
    captured = graphed(engine, most_rows=8)
    inner, places = engine.model, set()

    def spying(step: PackedStep) -> Tensor:
        replays = sum(graph.replays for graph in captured)
        logits_RV = inner(step)
        if sum(graph.replays for graph in captured) > replays:
            places.add(logits_RV.data_ptr())
        return logits_RV

    engine.model = spying
    answers(engine, prompts[:8])
    assert len(captured) > 1 and len(places) == 1


def test_work_is_captured_on_the_models_device_whatever_torchs_current_one_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With several ranks on a machine the model is not on the current device."""
    current, seen = ["cuda:0"], list[tuple[str, str]]()

    class Stream:
        def __init__(self) -> None:
            self.device = current[-1]

        def wait_stream(self, other: Stream) -> None:
            assert self.device == other.device == "cuda:1"

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(str(wanted))
        yield
        current.pop()

    @contextmanager
    def on(kind: str, stream: Stream) -> Iterator[None]:
        seen.append((kind, stream.device))
        yield

    for name, fake in {
        "Stream": Stream, "current_stream": Stream, "device": device, "CUDAGraph": object,
        "graph_pool_handle": lambda: "pool", "stream": lambda stream: on("stream", stream),
        "graph": lambda _graph, pool, stream, mode: on(f"{pool}, {mode}", stream),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    CudaCapture(torch.device("cuda", 1))(lambda: seen.append(("work", current[-1])))
    assert seen == [
        ("stream", "cuda:1"), ("work", "cuda:1"),
        ("stream", "cuda:1"), ("pool, thread_local", "cuda:1"), ("work", "cuda:1"),
    ]  # fmt: skip
    assert current == ["cuda:0"]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1, 2]),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64)),
    ],
)
def test_a_recording_refuses_what_a_capture_refuses(work: Callable[[Tensor], object]) -> None:
    x = torch.ones(4)
    with pytest.raises(CaptureError), Recording():
        work(x)


def test_a_recording_repeats_operations_not_python() -> None:
    x, out = torch.ones(2), torch.zeros(2)
    factor = [2.0]

    def work() -> None:
        out.copy_((x * factor[0]).view(1, 2)[0] + 1)

    graph = record(work)
    factor[0] = 100.0
    x[1] = 5.0
    graph.replay()
    assert out.tolist() == [3.0, 11.0]
