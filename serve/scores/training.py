"""The answers of training rows, to tell which answers of a model are copies of them."""

from __future__ import annotations

import hashlib

from qwen_ds.data.read.dialogue import Dropped
from qwen_ds.data.read.sources import ReadOptions, iter_conversations
from qwen_ds.errors import UserError
from qwen_ds.runlog import say
from serve.options import EvaluateOptions


class TrainingAnswers:
    """The answers of training rows, blanks around them aside; 16 bytes of each are kept."""

    def __init__(self, options: EvaluateOptions) -> None:
        """Read `training` as --data is read. UserError: no such file, or rows without answers."""
        self._sums: set[bytes] = set()
        files = options.files().told_by(say)
        reading = ReadOptions(options.format, options.columns, options.system, "skip", files)
        dropped = 0
        for result, _ in iter_conversations(options.training, reading):
            if isinstance(result, Dropped):
                dropped += 1
                continue
            answers = (turn.text for turn in result.turns if turn.role == "assistant")
            self._sums.update(map(_sum, answers))
        if not self._sums:
            raise UserError(
                f"--training {', '.join(options.training)}: no answers; expected training rows"
            )
        if dropped:
            say(f"--training: {dropped:,} rows have no answer, or cannot be read")

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and _sum(text) in self._sums


def _sum(text: str) -> bytes:
    raw = text.strip().encode(errors="surrogatepass")
    return hashlib.blake2b(raw, digest_size=16).digest()
