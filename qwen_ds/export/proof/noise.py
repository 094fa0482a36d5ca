"""The noise of rounding weights to a dtype, drawn at random: storing them makes it unavoidable.

Shapes: N values of the table.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qwen_ds.disk.weights import FLOAT_DTYPES

_EXPONENT = 0x7F800000  # of an fp32 number: alone, it is the power of two below the number
_TABLE_SIZE = 2**23
_ITEMS_AT_ONCE = 2**18  # 1 MB: stays in the processor's cache


class RoundingNoise:
    """Noise as a rounding of weights to their dtype makes it: uniform, of half a step up or down.

    Random numbers are drawn once, and each piece of a tensor takes them from a random place on:
    drawing billions would take longer than everything else.
    """

    def __init__(self, rounded: Mapping[str, str]) -> None:
        self._rounded = rounded  # the base's tensor name -> dtype
        self._generator = torch.Generator().manual_seed(0)
        self._table_N = torch.rand(_TABLE_SIZE, generator=self._generator) - 0.5
        self._step = torch.empty(_ITEMS_AT_ONCE)

    @torch.no_grad()
    def spoil(self, module: nn.Module) -> None:
        """Round in place what the output stores rounded: base + adapters, already folded.

        The step of a rounding is that of the merged weight. Where the change is about as large as
        the weight, the base's own is smaller, and a right merge would seem too far off
        (test_a_change_as_large_as_the_weights_passes).
        """
        for name, parameter in module.named_parameters():
            if name in self._rounded:
                self._add(parameter.data, self._rounded[name])

    def _add(self, weight: Tensor, dtype: str) -> None:
        """Spoil the contiguous fp32 tensor `weight` as one rounding to `dtype` would."""
        info = torch.finfo(FLOAT_DTYPES[dtype])
        smallest = info.smallest_normal * info.eps  # step between subnormal numbers
        for part in weight.view(-1).split(_ITEMS_AT_ONCE):
            step = self._step[: part.numel()]
            torch.bitwise_and(part.view(torch.int32), _EXPONENT, out=step.view(torch.int32))
            step.mul_(info.eps).clamp_(min=smallest)
            last_start = _TABLE_SIZE - part.numel()
            first = int(torch.randint(last_start + 1, (), generator=self._generator))
            part.addcmul_(step, self._table_N[first : first + part.numel()])
