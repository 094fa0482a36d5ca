"""A language model of a few lines, whose next token follows from the row alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

VOCABULARY = 16


@dataclass
class FakeOutput:
    logits: Tensor
    past_key_values: Tensor


@dataclass
class FakeModel:
    """Logits are random numbers that depend on the sum of the row's real tokens; the cache is that
    sum."""

    head_rows: int = VOCABULARY
    calls: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Tensor | None,
        use_cache: bool,
        logits_to_keep: int,
    ) -> FakeOutput:
        assert use_cache and logits_to_keep == 1
        self.calls.append(tuple(input_ids.shape))
        sums_B = (input_ids * attention_mask[:, -input_ids.shape[1] :]).sum(-1)
        sums_B = sums_B if past_key_values is None else sums_B + past_key_values
        rows = [
            torch.randn(self.head_rows, generator=torch.Generator().manual_seed(int(s)))
            for s in sums_B
        ]
        return FakeOutput(torch.stack(rows).unsqueeze(1), sums_B)


def spell(ids: tuple[int, ...] | list[int]) -> str:
    """Ids as letters."""
    return "".join(chr(ord("a") + i) for i in ids)
