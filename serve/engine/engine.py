"""A model on one device, ready to answer; and the engine that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from qwen_ds.decode.batch import GrowingAnswer
from qwen_ds.decode.engine import DecodingEngine, PackedModel, packed
from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.decode.graphs import GraphedModel
from qwen_ds.decode.kv import KVShape, KVStore, pages_in
from qwen_ds.decode.kv_pages import PagedStore
from qwen_ds.decode.kv_rows import ContiguousStore
from qwen_ds.decode.paged_attention import page_tokens
from qwen_ds.decode.request import Completion, Request, Vocabulary
from qwen_ds.decode.scheduler import EngineLimits
from qwen_ds.decode.stop import StopRule
from qwen_ds.errors import UserError
from qwen_ds.machine import available_memory
from serve.engine.adapters import AdaptedModel, ServedAdapters

PREFILL_BESIDE = 72  # on a CPU: a step with a piece of a prompt takes up to twice as long
# Of the memory that is free once the model is loaded; the rest is for activations.
MEMORY_SHARE = 0.85
_LEAST_PAGES = 4
_AHEAD = 2  # requests that wait for a slot; others are left to other ranks


@dataclass(frozen=True)
class ServingEngine:
    """A model in evaluation mode, with what decoding needs to know; `load_engine` makes one."""

    model: nn.Module
    vocabulary: Vocabulary
    stop: StopRule  # the tokens by which the model ends a turn
    context: int  # tokens that prompt and answer may have together
    shape: KVShape
    alpha_of: Callable[[int], int]
    adapters: ServedAdapters | None = None

    def __post_init__(self) -> None:
        self.model.eval()  # dropout off, that of an adapter included

    @property
    def device(self) -> torch.device:
        return self.shape.device

    def start(
        self, slots: int = 16, prefill_tokens: int = 256, memory_gb: float | None = None
    ) -> DecodingEngine:
        """An engine that runs up to `slots` rows together, with keys and values of so many GB
        (10^9 bytes; None: most of what is free)."""
        memory = MEMORY_SHARE * self._free_memory() if memory_gb is None else memory_gb * 1e9
        page = page_tokens(self.shape)
        pages = pages_in(memory, self.shape, page)
        if pages < _LEAST_PAGES:
            came = f"memory for keys and values: {memory / 1e9:.3g} GB"
            least = _LEAST_PAGES * page * self.shape.bytes_per_token / 1e9
            raise UserError(f"{came}; expected at least {least:.3g} GB (--memory_gb)")
        model: PackedModel = packed(self.model)
        names: tuple[str, ...] = ()
        numbers = None
        if self.adapters is not None:
            model, names = AdaptedModel(model, self.adapters), self.adapters.names
            numbers = self.adapters.numbers
        store: KVStore
        if self.device.type == "cuda":
            try:
                store = PagedStore(self.shape, pages, page)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"memory for keys and values: {memory / 1e9:.3g} GB do not fit the GPU; "
                    "expected a smaller --memory_gb"
                ) from None
            model = GraphedModel(model, store, slots, numbers)
        else:
            store = ContiguousStore(self.shape, pages, page)
        beside = None if self.device.type == "cuda" else PREFILL_BESIDE
        limits = EngineLimits(slots, prefill_tokens, self.context, beside)
        return DecodingEngine(model, store, self.vocabulary, limits, self.alpha_of, names)

    def _free_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return available_memory()


def stream(
    engine: DecodingEngine, requests: Iterable[Request]
) -> Iterator[tuple[int, Completion | DecodingError]]:
    """Yield (index into requests, answer or why there is none) as they end. Requests are taken as
    slots free up, and a few ahead."""
    coming, is_over = enumerate(requests), False
    growing: dict[int, tuple[int, GrowingAnswer]] = {}
    while True:
        while not is_over and len(engine.scheduler.waiting) < _AHEAD:
            if (one := next(coming, None)) is None:
                is_over = True
                break
            i, request = one
            try:
                growing[engine.submit(request)] = i, GrowingAnswer(request)
            except DecodingError as error:
                yield i, error
        if not engine.is_busy:
            return
        with torch.inference_mode():
            updates = engine.step()
        for update in updates:
            i, answer = growing[update.id]
            if update.error is not None:
                del growing[update.id]
                yield i, update.error
                continue
            answer.add(update)
            if update.finish_reason is not None:
                del growing[update.id]
                yield i, answer.completion()
