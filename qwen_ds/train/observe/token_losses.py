"""Loss of each target token of a few rows, before the first step and after the last.

Shapes: L tokens of one row, at most MAX_TOKENS.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qwen_ds.data.rows.token_rows import TokenRows
from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.tokenizer import Encoding
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.survive.watchdog import Watchdog

MAX_TOKENS = 2048  # of a row; a longer one is cut


@dataclass(frozen=True, slots=True)
class RowLosses:
    """A row's text in pieces, and the loss of each: a line of token_losses.jsonl."""

    when: Literal["start", "end"]
    step: int
    source: str  # "file:line"
    pieces: list[str]
    losses: list[float | None]
    """Nats; None for a piece without a target token, and for a loss that is not finite."""


class TokenLosses:
    """Losses of `count` rows, which lie evenly spread in the data: at each call the same ones."""

    def __init__(self, rows: TokenRows, count: int, encoding: Encoding, watchdog: Watchdog) -> None:
        self._rows, self._encoding, self._watchdog = rows, encoding, watchdog
        self._chosen = evenly_spread(len(rows), count)

    def __call__(
        self, engine: TrainingEngine, when: Literal["start", "end"], step: int
    ) -> list[RowLosses]:
        """Measure all rows, by the training formula and without dropout.

        Every rank measures every row alike: under ZeRO-3 a forward pass is a collective. It draws
        no random number, so the training goes on as it would have (test_jobs).
        """
        if not self._chosen:
            return []
        engine.train(False)
        # A few rows of other lengths and without gradients are not worth compiling the blocks for.
        with torch.compiler.set_stance("force_eager"):
            found = [self._measure(engine, row, when, step) for row in self._chosen]
        engine.train(True)
        return found

    def _measure(
        self, engine: TrainingEngine, row: int, when: Literal["start", "end"], step: int
    ) -> RowLosses:
        source = self._rows.source(row)
        self._watchdog.at(step, f"loss of each token of {source}")
        ids_L, labels_L = (torch.from_numpy(part[:MAX_TOKENS]).long() for part in self._rows[row])
        labels_L[0] = IGNORE  # nothing predicts it
        losses_BL = engine.token_losses(ids_L[None], labels_L[None])
        is_target_L = (labels_L != IGNORE).tolist()
        losses: list[float | None] = [
            loss if is_target else None
            for loss, is_target in zip(losses_BL[0].tolist(), is_target_L, strict=True)
        ]
        joined = list(pieces(self._encoding, ids_L.tolist(), losses))
        return RowLosses(when, step, source, [text for text, _ in joined], [x for _, x in joined])


def evenly_spread(rows: int, count: int) -> list[int]:
    """The places of `count` of `rows` rows, the middles of equal parts; of all if they are
    fewer."""
    count = min(rows, count)
    return [(2 * i + 1) * rows // (2 * count) for i in range(count)]


def pieces(
    encoding: Encoding, ids: Sequence[int], losses: Sequence[float | None]
) -> Iterator[tuple[str, float | None]]:
    """The text of the ids in pieces of whole characters, each with its loss.

    A piece is one token, or neighbours that hold parts of one character: their losses are summed.
    A control token stands alone, also where a row that was cut leaves half a character before it
    (which becomes U+FFFD). Joined, the pieces are `encoding.decode(ids)`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, parts = "", list[float | None]()
    for i, (index, loss) in enumerate(zip(ids, losses, strict=True)):
        token = encoding.token(index)
        if parts and isinstance(token, str):
            yield text + decoder.decode(b"", final=True), _sum(parts)
            text, parts = "", []
        content = token.encode() if isinstance(token, str) else token
        text += decoder.decode(content, final=i == len(ids) - 1)
        parts.append(loss)
        waiting, _ = decoder.getstate()
        if not waiting:
            yield text, _sum(parts)
            text, parts = "", []


def _sum(losses: list[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    # JSON has neither NaN nor infinity.
    return sum(known) if known and all(map(math.isfinite, known)) else None
