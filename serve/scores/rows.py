"""A row to score: an answer, and the texts and figures that it is held against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One answer with its references, at least one."""

    prediction: str
    references: tuple[str, ...]
    finish_reason: str | None = None  # "stop": ended by <|im_end|>; None: not known
    reference_nll: float | None = None  # nats, summed over the first reference's target tokens
    reference_tokens: int | None = None  # target tokens of the first reference

    def __post_init__(self) -> None:
        assert self.references, "a row without a reference"
