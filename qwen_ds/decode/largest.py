"""The largest logits of rows: on a CPU in a tenth of the time that torch takes.

Shapes: G rows of any kind, B rows of a batch, C rows with candidates, V rows of the head, M maxima
of blocks, N values of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CACHED = 5 * 2**18  # fp32 numbers: 5 MB, where a part's own cost is small beside the work
_PLACE = 0xFFFFFFFF  # the half of a sorting key that is the place


def rows_at_once(values_GV: Tensor) -> int:
    """Rows to work on together: on a CPU so few that they stay in the caches, elsewhere all."""
    rows, columns = values_GV.shape
    if values_GV.device.type == "cpu":
        return max(torch.get_num_threads(), _CACHED // max(columns, 1), 1)
    return max(rows, 1)


def most_probable(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row (NaN is larger than any number), and the first place of it."""
    if logits_BV.device.type != "cpu":
        largest_B, ids_B = logits_BV.max(-1)
        return largest_B, ids_B
    # numpy's argmax takes a tenth of torch's time, and has no bf16.
    parts = logits_BV.split(rows_at_once(logits_BV))
    ids_B = torch.from_numpy(np.concatenate([x.float().numpy().argmax(-1) for x in parts]))
    return logits_BV.gather(1, ids_B.unsqueeze(1)).squeeze(1), ids_B


def top_values(values_CV: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` largest values in descending order, and their places.

    On a CPU only those are sorted that are at least the size-th largest of the maxima of so many
    blocks or more: `size` values must be as large. Of equal values the first then comes first, as
    in `in_order`, and of fewer finite ones the rest is -inf.
    """
    if values_CV.device.type != "cpu":
        top_CN, places_CN = values_CV.topk(size)
        return top_CN, places_CN
    rows, columns = values_CV.shape
    block = max(1, columns // (4 * size))
    blocks = columns // block
    # A block's members lie apart: so maxima are several times as fast as over neighbours.
    maxima_CM = values_CV[:, : blocks * block].unflatten(1, (block, blocks)).amax(1)
    least_C = maxima_CM.kthvalue(blocks - size + 1).values.clamp(min=torch.finfo().min)
    found_CN = np.full((rows, size), -np.inf, dtype=np.float32)
    found_at_CN = np.zeros((rows, size), dtype=np.int64)
    for row, (values_V, least) in enumerate(zip(values_CV.numpy(), least_C.numpy(), strict=True)):
        places = np.flatnonzero(values_V >= least)  # none beside NaN
        keys = _sorting_keys(values_V[places], places)
        keys.sort()
        places = keys[:size] & _PLACE
        found_CN[row, : len(places)] = values_V[places]
        found_at_CN[row, : len(places)] = places
    return torch.from_numpy(found_CN), torch.from_numpy(found_at_CN)


def in_order(values_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Values in descending order, and their places; of equal ones the first comes first."""
    if values_CV.device.type != "cpu":
        sorted_CV, places_CV = values_CV.sort(descending=True, stable=True)
        return sorted_CV, places_CV
    keys_CV = _sorting_keys(values_CV.numpy(), np.arange(values_CV.shape[1]))
    keys_CV.sort(axis=-1)
    places_CV = torch.from_numpy(keys_CV & _PLACE)
    return values_CV.gather(1, places_CV), places_CV


def _sorting_keys(values: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 numbers whose order is that of falling values, then of rising places.

    The upper half of each is the value, in an order of integers, and the lower half its place:
    numpy sorts integers several times as fast as torch does numbers with their places.
    """
    bits = (values + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)  # negative numbers lie the other way round
    keys = (~bits).astype(np.int64)
    keys <<= 32
    keys |= places
    return keys
