"""A module of a served model, changed by several adapters: each token gets its own adapter's.

The base's module runs on all tokens, so the base's own tokens get the bits that they get without
adapters. After it come the parts that adapters have: the low-rank change of a linear layer, tensors
in place of the module's own, single rows of the embedding or the head.

Adapters have numbers from 1; 0 is the bare base.

Shapes: N tokens, n those of one adapter, K adapters and the base before them, R rank (the largest;
smaller ones are padded with zeros), D input features, O output features, V rows of a vocabulary, M
replaced rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Up to so many products of tokens and ranks, those of all adapters together, one matrix product for
# all adapters is faster than one for each (tests/benchmarks/serve_adapters.py): 1,024 ranks when 32
# rows decode.
SIDE_BY_SIDE = 32 * 1024


@dataclass(slots=True, eq=False)
class Tokens:
    """The tokens that a module gets in one step, and the adapter of each."""

    number_N: Tensor  # int64
    groups: Sequence[tuple[int, slice | Tensor]]  # an adapter's number, where its tokens are
    is_shape_fixed: bool = False
    """Whether what is done may not depend on who has which adapter: `number_N` alone says it, and
    another forward with other numbers in it repeats the same operations (CUDA graphs)."""
    _others: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def is_all_base(self) -> bool:
        return not self.groups and not self.is_shape_fixed

    @property
    def only(self) -> int | None:
        """The number of the adapter that all tokens have, as far as it is known."""
        if self.is_shape_fixed or len(self.groups) != 1:
            return None
        number, where = self.groups[0]
        is_all = isinstance(where, slice) and where.stop - where.start == len(self.number_N)
        return number if is_all else None

    def others(self, adapters: int, rank: int) -> Tensor:
        """bool [N, adapters * rank]: whether a column belongs to another adapter than the token's.
        The layers of a step share it."""
        if (adapters, rank) not in self._others:
            columns = torch.arange(adapters * rank, device=self.number_N.device)
            self._others[adapters, rank] = self.number_N[:, None] != columns // rank + 1
        return self._others[adapters, rank]


@dataclass(slots=True, eq=False)
class AdapterStep:
    """The adapters of the forward that runs, as all changed modules see them; else None."""

    tokens: Tokens | None = None  # of all tokens
    due: Tokens | None = None  # of those that the head gets


class AdaptedPart(Protocol):
    """Whatever adapters have beside or in place of a module's own."""

    def __call__(self, base: nn.Module, out: Tensor, x: Tensor, tokens: Tokens) -> None:
        """Change the module's output in place: out is [N, O], x [N, D] (ids: [N])."""


class AdaptedModule(nn.Module):
    """A module of the base and its parts. Inputs are [1, N, ...], as in a packed step."""

    def __init__(self, base: nn.Module, step: AdapterStep, is_head: bool = False) -> None:
        super().__init__()
        self.base = base
        self.own: OwnTensors | None = None
        self.parts: list[AdaptedPart] = []
        self._step, self._is_head = step, is_head

    def forward(self, x: Tensor) -> Tensor:
        tokens = self._step.due if self._is_head else self._step.tokens
        if tokens is None or tokens.is_all_base:
            return self.base(x)
        assert x.shape[0] == 1, "adapters act in packed steps"
        own = None if self.own is None else self.own.by_adapter.get(tokens.only or 0)
        if own is not None:  # nobody needs the base's
            out = functional_call(self.base, own, (x,))
        else:
            out = self.base(x)
            if self.own is not None:
                self.own(self.base, out[0], x[0], tokens)
        for part in self.parts:
            part(self.base, out[0], x[0], tokens)
        return out


@dataclass(slots=True)
class OwnTensors:
    """Tensors in place of the module's own (modules_to_save, a bias), by adapter and name."""

    by_adapter: dict[int, dict[str, Tensor]]

    def __call__(self, base: nn.Module, out: Tensor, x: Tensor, tokens: Tokens) -> None:
        if tokens.is_shape_fixed:
            for number, own in self.by_adapter.items():
                is_its = (tokens.number_N == number)[:, None]
                out.copy_(torch.where(is_its, functional_call(base, own, (x[None],))[0], out))
            return
        for number, where in tokens.groups:
            if number in self.by_adapter:
                out[where] = functional_call(base, self.by_adapter[number], (x[where][None],))[0]


@dataclass(slots=True)
class LoraPart:
    """The low-rank changes of a linear layer, zeros where an adapter has none."""

    A_KRD: Tensor
    B_KRO: Tensor  # times the scaling
    ranks: dict[int, int]  # by adapter that changes the layer

    @classmethod
    def of(
        cls, pairs: Mapping[int, tuple[Tensor, Tensor]], adapters: int, weight_OD: Tensor
    ) -> LoraPart:
        """From A_RD and B_RO of each adapter that changes the layer."""
        ranks = {number: len(a) for number, (a, _) in pairs.items()}
        out, width = weight_OD.shape
        a_KRD = weight_OD.new_zeros(adapters + 1, max(ranks.values()), width)
        b_KRO = weight_OD.new_zeros(adapters + 1, max(ranks.values()), out)
        for number, (a, b) in pairs.items():
            a_KRD[number, : len(a)], b_KRO[number, : len(a)] = a, b
        return cls(a_KRD, b_KRO, ranks)

    def __call__(self, base: nn.Module, out: Tensor, x: Tensor, tokens: Tokens) -> None:
        adapters, rank = len(self.A_KRD) - 1, self.A_KRD.shape[1]
        is_wide = adapters * rank * len(x) > SIDE_BY_SIDE
        groups = [group for group in tokens.groups if group[0] in self.ranks]
        if tokens.is_shape_fixed and is_wide:
            out += lora_gather(x, self.A_KRD, self.B_KRO, tokens.number_N)
        elif tokens.is_shape_fixed or (len(groups) > 1 and not is_wide):
            low_NR = x @ self.A_KRD[1:].flatten(0, 1).T
            # Not times zero: in float16 the product with another's A may be infinite.
            low_NR.masked_fill_(tokens.others(adapters, rank), 0)
            out.addmm_(low_NR, self.B_KRO[1:].flatten(0, 1))
        else:
            for number, where in groups:
                a_RD, b_RO = (m[number, : self.ranks[number]] for m in (self.A_KRD, self.B_KRO))
                low_nR = x[where] @ a_RD.T
                if isinstance(where, slice):
                    out[where].addmm_(low_nR, b_RO)
                else:
                    out.index_add_(0, where, low_nR @ b_RO)


def lora_gather(x_ND: Tensor, A_KRD: Tensor, B_KRO: Tensor, index_N: Tensor) -> Tensor:
    """Each token's low-rank change [N, O], by matrices that are gathered for it: the same
    operations whatever adapters the tokens have. B holds the scaling."""
    low_N1R = torch.bmm(x_ND[:, None], A_KRD[index_N].transpose(1, 2))
    return torch.bmm(low_N1R, B_KRO[index_N])[:, 0]


@dataclass(slots=True)
class OwnEmbeddingRows:
    """Rows that adapters replace in an embedding."""

    place_KV: Tensor  # int32: where an adapter's row of a token is; 0: the base's is good
    rows_MD: Tensor  # from place 1

    @classmethod
    def of(
        cls, rows: Mapping[int, tuple[Sequence[int], Tensor]], adapters: int, weight_VD: Tensor
    ) -> OwnEmbeddingRows:
        """From the indices and rows of each adapter that replaces some."""
        place_KV = torch.zeros(
            adapters + 1, len(weight_VD), dtype=torch.int32, device=weight_VD.device
        )
        stacked, first = [weight_VD[:1]], 1
        for number, (indices, rows_nD) in rows.items():
            last = first + len(indices)
            place_KV[number, list(indices)] = torch.arange(first, last).to(place_KV)
            stacked.append(rows_nD)
            first = last
        return cls(place_KV, torch.cat(stacked))

    def __call__(self, base: nn.Module, out: Tensor, x: Tensor, tokens: Tokens) -> None:
        place_N = self.place_KV[tokens.number_N, x]
        out.copy_(torch.where((place_N > 0)[:, None], self.rows_MD[place_N], out))


@dataclass(slots=True)
class OwnHeadRows:
    """Rows that adapters replace in a head: single logits."""

    by_adapter: dict[int, tuple[Tensor, Tensor]]  # indices int64 [M], rows [M, D]

    @classmethod
    def of(cls, rows: Mapping[int, tuple[Sequence[int], Tensor]], weight_VD: Tensor) -> OwnHeadRows:
        """From the indices and rows of each adapter that replaces some."""
        device = weight_VD.device
        return cls({n: (torch.tensor(i, device=device), r) for n, (i, r) in rows.items()})

    def __call__(self, base: nn.Module, out: Tensor, x: Tensor, tokens: Tokens) -> None:
        if tokens.is_shape_fixed:
            for number, (indices_M, rows_MD) in self.by_adapter.items():
                is_its = (tokens.number_N == number)[:, None]
                out[:, indices_M] = torch.where(is_its, x @ rows_MD.T, out[:, indices_M])
            return
        for number, where in tokens.groups:
            if number in self.by_adapter:
                indices_M, rows_MD = self.by_adapter[number]
                rows = where if isinstance(where, slice) else where[:, None]
                out[rows, indices_M] = x[where] @ rows_MD.T
