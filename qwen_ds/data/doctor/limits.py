"""The rows that data.max_* cuts, and the value that would cut fewer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_ds.recipe.options import DataOptions

LIMITS = (256, 512, 1024, 2048)
# Tokens of ChatML beside the texts: `<|im_start|>role\n` and `<|im_end|>\n` of system and user with
# the default system text, and the marks of the answer (qwen_ds/data/rows/encode.py).
PROMPT_MARKS, ANSWER_MARKS, TURN_MARKS = 17, 4, 5
FEW = 0.001  # a share of rows that may be cut


@dataclass(frozen=True, slots=True)
class Cuts:
    """The rows that one option cuts, and the shares under other values.

    is_cut_N is bool [N]; shares is by value.
    """

    option: str
    value: int
    is_cut_N: np.ndarray
    shares: dict[int, float]

    @property
    def advice(self) -> str:
        """The option, and the value that mends it."""
        mends = next(
            (v for v, share in self.shares.items() if v > self.value and share <= FEW), None
        )
        shares = ", ".join(f"{share:.1%} at {value}" for value, share in self.shares.items())
        if mends is None:
            return (
                f"shorten these rows, or drop them: {self.option} {self.value} cuts them ({shares})"
            )
        return f"set {self.option} to {mends} (now {self.value}; cut: {shares})"


def cuts(
    data: DataOptions, seq_length: int | None, asked_N: np.ndarray, said_N: np.ndarray,
    turns_N: np.ndarray,
) -> list[Cuts]:  # fmt: skip
    """The rows that each of the limits that apply would cut, as encode_row cuts.

    Args:
        asked_N, said_N: tokens before the last answer, and of it.
        turns_N: turns, without the system's.
    """
    prompt_N = asked_N + PROMPT_MARKS + TURN_MARKS * np.maximum(turns_N - 2, 0)
    answer_N = said_N + ANSWER_MARKS
    single_N = _is_single(data, turns_N)
    n_prompt, n_answer = data.max_prompt_tokens, data.max_answer_tokens
    bound = seq_length if data.max_tokens is None else data.max_tokens
    total = max(len(turns_N), 1)

    def answers(limit: int) -> np.ndarray:
        return single_N & (prompt_N + answer_N > n_prompt + limit) & (answer_N > limit)

    def prompts(limit: int) -> np.ndarray:
        return single_N & (prompt_N + answer_N > limit + n_answer) & (prompt_N > limit)

    def rows(limit: int) -> np.ndarray:
        return ~single_N & (prompt_N + answer_N > limit)

    found = [
        Cuts(option, value, cut(value), {v: float(cut(v).sum() / total) for v in LIMITS})
        for option, value, cut in (
            ("data.max_answer_tokens", n_answer, answers),
            ("data.max_prompt_tokens", n_prompt, prompts),
            ("data.max_tokens", bound, rows),
        )
        if value is not None
    ]
    return [each for each in found if single_N.any() or each.option == "data.max_tokens"]


def num_without_limit(data: DataOptions, turns_N: np.ndarray) -> int:
    """The number of rows that data.max_tokens alone bounds: not known without it or a model."""
    return int((~_is_single(data, turns_N)).sum()) if data.max_tokens is None else 0


def _is_single(data: DataOptions, turns_N: np.ndarray) -> np.ndarray:
    """Whether the limits on question and answer apply, bool [N]."""
    return (turns_N == 2) & (data.learn_on == "original")
