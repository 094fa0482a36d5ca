"""Changes of one tensor of the base by adapters, computed a block of rows at a time.

Shapes: O output features (rows), I input features, R rank, N rows of the block, K that
are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qwen_ds.model.adapter import Adapter


class Change(Protocol):
    """A change of one tensor. Block by block it gives the same as on the whole tensor."""

    @property
    def kind(self) -> str: ...

    def apply(self, block: Tensor, first: int) -> Tensor:
        """The changed rows, in new memory, of the base's rows from `first` on: fp32 [N, ...]."""
        ...


@dataclass(frozen=True, slots=True)
class LowRank:
    """weight + scaling * B @ A; with magnitudes, each row of that brought to its magnitude.

    Magnitudes are DoRA's (arXiv:2402.09353). The paper's columns are rows here, since a linear
    layer stores [O, I]. So the norm needs one row only, and blocks of rows are exact.
    """

    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    magnitude_O: Tensor | None

    @property
    def kind(self) -> str:
        return "lora" if self.magnitude_O is None else "dora"

    def apply(self, block: Tensor, first: int) -> Tensor:
        last = first + block.shape[0]
        changed = torch.addmm(block, self.b_OR[first:last], self.a_RI, alpha=self.scaling)
        if self.magnitude_O is not None:
            norm_N = torch.linalg.vector_norm(changed, dim=1)
            changed.mul_((self.magnitude_O[first:last] / norm_N)[:, None])
        return changed


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor of the adapter's own in place of the base's: modules_to_save, trained biases."""

    adapter: Adapter
    key: str
    kind: ClassVar[str] = "saved"

    def apply(self, block: Tensor, first: int) -> Tensor:
        return self.adapter.tensor(self.key, first, first + block.shape[0]).float()


@dataclass(frozen=True, slots=True)
class ReplacedRows:
    """Some rows replaced, the others as they are: trainable token rows."""

    indices_K: Tensor  # ascending
    values_KI: Tensor
    kind: ClassVar[str] = "rows"

    def apply(self, block: Tensor, first: int) -> Tensor:
        changed, ends = block.clone(), torch.tensor([first, first + block.shape[0]])
        start, stop = torch.searchsorted(self.indices_K, ends).tolist()
        changed[self.indices_K[start:stop] - first] = self.values_KI[start:stop]
        return changed


@dataclass(frozen=True, slots=True)
class InSequence:
    """Each change onto the result of the one before, without a rounding between."""

    changes: tuple[Change, ...]

    @property
    def kind(self) -> str:
        return ", ".join(change.kind for change in self.changes)

    def apply(self, block: Tensor, first: int) -> Tensor:
        for change in self.changes:
            block = change.apply(block, first)
        return block


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """weight + sum of w * (change(weight) - weight), each change made to the bare base."""

    changes: tuple[tuple[float, Change], ...]  # w and change

    @property
    def kind(self) -> str:
        return " + ".join(f"{weight:g} {change.kind}" for weight, change in self.changes)

    def apply(self, block: Tensor, first: int) -> Tensor:
        changed = block.clone()
        for weight, change in self.changes:
            changed.add_(change.apply(block, first).sub_(block), alpha=weight)
        return changed


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters that are folded into a base, each onto the result of the one before.

    With weights: the weighted sum of what each does to the bare base.
    """

    members: tuple[Adapter, ...]
    weights: Sequence[float] | None = None

    def changed_tensors(self) -> list[str]:
        """Names of the base's tensors that change."""
        return sorted({name for adapter in self.members for name in adapter.changed_tensors()})

    def replaced_tokens(self) -> list[int]:
        """Ids of the tokens whose rows are replaced, once for each adapter and tensor."""
        tables = [rows for adapter in self.members for rows in adapter.token_rows.values()]
        return [index for rows in tables for index in rows.indices]


def load_changes(adapters: Adapters, name: str) -> Change:
    """Load the change of the base's tensor `name` by all adapters that change it, at least one."""
    changes = {
        i: load_change(adapter, name)
        for i, adapter in enumerate(adapters.members)
        if name in adapter.changed_tensors()
    }
    if adapters.weights is not None:
        return WeightedSum(tuple((adapters.weights[i], change) for i, change in changes.items()))
    one, *more = changes.values()
    return InSequence((one, *more)) if more else one


def load_change(adapter: Adapter, name: str) -> Change:
    """Load the change of the base's tensor `name`, one of `adapter.changed_tensors()`.

    Low-rank matrices and single rows are read here, a whole saved tensor by the block.
    """
    if name in adapter.saved:
        return Replacement(adapter, adapter.saved[name])
    module = name.removesuffix(".weight")
    if module in adapter.token_rows:
        rows = adapter.token_rows[module]
        indices_K, order_K = torch.tensor(rows.indices).sort()
        return ReplacedRows(indices_K, adapter.tensor(rows.key)[order_K].float())
    pair = adapter.pairs[module]
    a_RI, b_OR = adapter.tensor(pair.a_key).float(), adapter.tensor(pair.b_key).float()
    magnitude_O = None if pair.magnitude_key is None else adapter.tensor(pair.magnitude_key).float()
    return LowRank(a_RI, b_OR, pair.scaling, magnitude_O)
