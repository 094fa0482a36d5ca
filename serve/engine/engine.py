"""The engine behind prediction and evaluation: a model on one device that answers in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qwen_ds.decode.batch import Completion, DecodingRow, Vocabulary, decode_batch
from qwen_ds.decode.exceptions import RowOutOfMemory
from qwen_ds.decode.stop import StopRule


@dataclass(frozen=True)
class ServingEngine:
    """A model in evaluation mode, with what decoding needs to know; `load_engine` makes one."""

    model: nn.Module
    vocabulary: Vocabulary
    stop: StopRule  # the tokens by which the model ends a turn
    context: int  # tokens that prompt and answer may have together

    def __post_init__(self) -> None:
        self.model.eval()  # dropout off, that of an adapter included

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def stream(
        self, rows: Sequence[DecodingRow], batch_size: int = 16
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index into rows, completion) as batches finish: the longest prompts come first.

        `batch_size` rows are decoded together; a batch that does not fit the GPU is halved.

        Raises:
            PromptTooLong: a prompt leaves no room for its new tokens; raised before any decoding.
            LogitsNotFinite, RowOutOfMemory: see qwen_ds/decode/exceptions.py.
        """
        for row in rows:
            row.require_room(self.context)
        # Sorted by length, for little padding.
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].prompt), i))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield from zip(chosen, self._batch([rows[i] for i in chosen]), strict=True)

    def _batch(self, rows: Sequence[DecodingRow]) -> list[Completion]:
        """Completions of the rows, in two halves if they do not fit the GPU together."""
        with contextlib.suppress(torch.OutOfMemoryError), torch.inference_mode():
            return decode_batch(self.model, rows, self.vocabulary, self.device)
        if len(rows) == 1:
            raise RowOutOfMemory
        torch.cuda.empty_cache()
        middle = len(rows) // 2
        return self._batch(rows[:middle]) + self._batch(rows[middle:])
