"""Bytes that a decoding step moves beside attention itself do not grow with what rows have behind
them, and no mask over all keys is made."""

from __future__ import annotations

import pytest
import torch

from qwen_ds.decode import kv_pages
from qwen_ds.decode.engine import DecodingEngine, packed
from qwen_ds.decode.kv import KVStore
from qwen_ds.decode.kv_pages import PagedStore
from qwen_ds.decode.kv_rows import ContiguousStore
from qwen_ds.decode.request import Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.scheduler import EngineLimits
from qwen_ds.decode.stop import StopRule
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.packing import kv_shape
from tests.decode.test_engine import WORDS
from tests.decode.test_waits import APART, waits
from tests.moved import Moved, tensors

__all__ = ["waits"]  # a fixture

CPU, ROWS = torch.device("cpu"), 4
CONFIG = QWenConfig(
    vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, kv_channels=64,
    intermediate_size=64, seq_length=8192,
)  # fmt: skip


class Traffic(Moved):
    """Also the elements of the largest mask that is made."""

    largest_mask = 0

    def note(self, name: str, inputs: object, outputs: object) -> None:
        super().note(name, inputs, outputs)
        masks = [x.numel() for x in tensors(outputs) if x.dtype == torch.bool]
        self.largest_mask = max(self.largest_mask, *masks, 0)


def decoding(store: KVStore, context: int) -> Traffic:
    """The traffic of a step of rows that have so many tokens."""
    with store.shape.device:
        model = QWenLMHeadModel._from_config(CONFIG, dtype=torch.bfloat16).eval()
    limits = EngineLimits(ROWS, 1 << 16, 8192)
    engine = DecodingEngine(packed(model), store, WORDS, limits)
    for i in range(ROWS):
        prompt = [65 + i, *[66] * (context - 2)]
        engine.submit(Request(prompt, SamplingParams(max_new_tokens=9), StopRule()))
    engine.step()
    engine.step()
    with Traffic() as traffic:
        assert len(engine.step()) == ROWS
    return traffic


def cache_bytes(tokens: int) -> int:
    return ROWS * tokens * kv_shape(CONFIG, torch.bfloat16, CPU).bytes_per_token


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("reading", ["tables", "pages"])
def test_pages_are_not_copied_to_be_read(monkeypatch: pytest.MonkeyPatch, reading: str) -> None:
    monkeypatch.setattr(kv_pages, "choose_reading", lambda *_: reading)
    short, long = (
        decoding(PagedStore(kv_shape(CONFIG, torch.bfloat16, APART), 80, 256), context)
        for context in (600, 4000)
    )
    # The results of pages are put together, 1 of them for 256 keys.
    assert 0 <= long.bytes.total() - short.bytes.total() < 0.06 * cache_bytes(4000 - 600)
    assert long.largest_mask < 600


@pytest.mark.usefixtures("waits")
def test_what_copies_pages_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pages, "choose_reading", lambda *_: "gathered")
    short, long = (
        decoding(PagedStore(kv_shape(CONFIG, torch.bfloat16, APART), 80, 256), context)
        for context in (600, 4000)
    )
    assert long.bytes.total() - short.bytes.total() > cache_bytes(4000 - 600)
    assert long.largest_mask >= 4000


def test_a_row_in_one_piece_is_read_where_it_lies() -> None:
    store = ContiguousStore(kv_shape(CONFIG, torch.bfloat16, CPU), 2000, 32)
    short, long = (decoding(store, context) for context in (300, 1004))
    assert long.bytes.total() == short.bytes.total()
    assert long.largest_mask < 300
