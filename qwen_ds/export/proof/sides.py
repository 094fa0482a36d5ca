"""The parts of both kinds of proof: texts, compared positions, and base + adapters as a module.

Shapes: T tokens of a row, P positions compared, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen_ds.export.stream.changes import Adapters
from qwen_ds.model.adapter import Adapter
from qwen_ds.model.adapter_loading import put_adapter

POSITIONS = 64


@dataclass(frozen=True, slots=True)
class ProofRow:
    """A text, and the positions in it at which logits are compared."""

    ids_T: Tensor  # int64
    positions: Tensor  # int64


@dataclass(frozen=True, slots=True)
class Outputs:
    """Logits of both sides at the same positions, fp32 [P, V]."""

    base_PV: Tensor
    expected_PV: Tensor  # of base + adapters
    noisy_PV: Tensor  # of base + adapters, folded and rounded at random
    merged_PV: Tensor


def spread_positions(rows_T: Sequence[Tensor], count: int = POSITIONS) -> list[ProofRow]:
    """Spread `count` positions evenly over the rows' second halves.

    The first halves are mostly the system message, which is the same for all.
    """
    places = [(i, t) for i, ids_T in enumerate(rows_T) for t in range(len(ids_T) // 2, len(ids_T))]
    count = min(count, len(places))
    chosen = [places[j * len(places) // count] for j in range(count)]
    at = [[t for i, t in chosen if i == row] for row in range(len(rows_T))]
    return [
        ProofRow(ids_T, torch.tensor(positions))
        for ids_T, positions in zip(rows_T, at, strict=True)
        if positions
    ]


def first_positions(rows_T: Sequence[Tensor], count: int = POSITIONS) -> list[ProofRow]:
    """The rows' beginnings, of `count` tokens in all, compared at every position.

    Nothing is computed in vain. Of many rows only the first few serve: beginnings of fewer than 16
    tokens mean little.
    """
    rows, left = [], count
    for i, ids_T in enumerate(rows_T):
        ids_T = ids_T[: min(left, max(16, -(-left // (len(rows_T) - i))))]
        if len(ids_T):
            rows.append(ProofRow(ids_T, torch.arange(len(ids_T))))
            left -= len(ids_T)
    return rows


def replaced_rows(adapters: Adapters, seq_length: int | None) -> list[ProofRow]:
    """A text of the tokens whose rows adapters replace: no other text need contain them.

    Of many such tokens 64 serve, spread evenly.
    """
    ids = sorted(set(adapters.replaced_tokens()))
    count = min(POSITIONS, seq_length or POSITIONS, len(ids))
    chosen = [ids[j * len(ids) // count] for j in range(count)]
    return [ProofRow(torch.tensor(chosen), torch.arange(count))] if chosen else []


@torch.no_grad()
def put_adapters(module: nn.Module, adapters: Adapters) -> Callable[[], None]:
    """Put adapters into the fp32 `module`, in place: a model, or a part with the whole's names.

    By peft's own arithmetic, so that the merge is not compared with itself. The last adapter of a
    sequence, most often the only one, stays beside its weights until the returned function folds it
    in, too.
    """
    names = {name for name, _ in module.named_parameters()}
    if adapters.weights is None:
        here = [one for one in adapters.members if names.intersection(one.changed_tensors())]
        for adapter in here[:-1]:
            _fold(module, adapter)
        wrapped = put_adapter(module, here[-1]) if here else None
        return _nothing if wrapped is None else wrapped.merge_and_unload
    changed = names.intersection(adapters.changed_tensors())
    base = {name: module.get_parameter(name).clone() for name in changed}
    total = {name: value.clone() for name, value in base.items()}
    for adapter, weight in zip(adapters.members, adapters.weights, strict=True):
        _fold(module, adapter)
        for name in changed.intersection(adapter.changed_tensors()):
            parameter = module.get_parameter(name)
            total[name].add_(parameter - base[name], alpha=weight)
            parameter.copy_(base[name])
    for name, value in total.items():
        module.get_parameter(name).copy_(value)
    return _nothing


def _nothing() -> None:
    """Fold nothing: no adapter is left beside its weights."""


def _fold(module: nn.Module, adapter: Adapter) -> None:
    if (wrapped := put_adapter(module, adapter)) is not None:
        wrapped.merge_and_unload()
