"""Adapters of a served model, unmerged: rows of different adapters and of the bare base share a
step, and the base's weights are there once.

The adapter of each token is set for one forward at a time, so the model's own code does not know of
adapters. They are not peft's layers, but compute what peft computes (tests/serve/engine/
test_adapters.py). DoRA has a norm over the whole changed weight and gets merged copies of its
layers.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qwen_ds.decode.engine import PackedModel, PackedStep, Runs
from qwen_ds.decode.transfers import on_device, sent
from qwen_ds.errors import UserError
from qwen_ds.model.adapter import Adapter
from qwen_ds.model.adapter_loading import check_copies
from qwen_ds.model.family import Family
from qwen_ds.runlog import say
from serve.engine.adapted import (
    AdaptedModule,
    AdapterStep,
    LoraPart,
    OwnEmbeddingRows,
    OwnHeadRows,
    OwnTensors,
    Tokens,
)

DEFAULT = "default"
"""The name of an adapter that answers requests that name none. The bare base is then not served."""


def named_adapters(given: Sequence[str]) -> dict[str, str]:
    """Folders by adapter name, from a command's values NAME=DIR; a bare DIR has the name default.

    A value that is a folder as a whole is one, whatever it holds. UserError: no name or no folder,
    or two adapters of one name.
    """
    found: dict[str, str] = {}
    for value in given:
        name, equals, folder = value.partition("=")
        if not equals or os.path.isdir(os.path.expanduser(value)):
            name, folder = DEFAULT, value
        if not name or not folder:
            raise UserError(f"--adapter is {value!r}; expected NAME=DIR")
        if name in found:
            came = f"two adapters are named {name}, {found[name]} and {folder}"
            raise UserError(f"{came}; expected NAME=DIR with a name of its own for each")
        found[name] = folder
    return found


class ServedAdapters:
    """The adapters on one model, by name; `put_adapters` makes them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.step = AdapterStep()
        self._numbers: dict[str | None, int] = {name: i + 1 for i, name in enumerate(names)}
        self._numbers[None] = self._numbers.get(DEFAULT, 0)

    def numbers(self, runs: Runs) -> list[int]:
        """The adapter's number of each token; 0 for the bare base."""
        return [self._numbers[name] for name, count in runs for _ in range(count)]

    def tokens(self, runs: Runs, device: torch.device) -> Tokens:
        """The adapters of consecutive tokens, on the device of the model."""
        spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
        start = 0
        for name, count in runs:
            own, end = spans[self._numbers[name]], start + count
            if own and own[-1][1] == start:
                own[-1] = (own[-1][0], end)
            elif count:
                own.append((start, end))
            start = end
        groups = [(number, _places(own, device)) for number, own in spans.items() if number and own]
        number_N = on_device(self.numbers(runs), torch.int64, device)
        return Tokens(number_N, groups)

    @contextmanager
    def acting_on_row(self, name: str | None, length: int, device: torch.device) -> Iterator[None]:
        """Let forwards of one row in this context, [1, length], have an adapter; the head asks for
        `set_due`, too."""
        try:
            self.step.tokens = self.tokens([(name, length)], device)
            yield
        finally:
            self.step.tokens = self.step.due = None

    def set_due(self, name: str | None, count: int, device: torch.device) -> None:
        """Give the next tokens that the head gets, so many, an adapter."""
        self.step.due = self.tokens([(name, count)], device)

    @contextmanager
    def acting(self, step: PackedStep) -> Iterator[None]:
        """Let the model's forward in this context give each token of a step its adapter's. Where
        the step has numbers, all of its tokens must be due."""
        runs, device = step.adapters, step.ids_1N.device
        try:
            if isinstance(runs, Tensor):
                self.step.tokens = self.step.due = Tokens(runs, (), is_shape_fixed=True)
            elif any(self._numbers[name] for name, _ in runs):
                self.step.tokens = self.tokens(runs, device)
                self.step.due = self.tokens(step.due_adapters, device)
            yield
        finally:
            self.step.tokens = self.step.due = None


@dataclass(frozen=True, slots=True)
class AdaptedModel:
    """A packed model in whose steps each row has its own adapter."""

    model: PackedModel
    adapters: ServedAdapters

    def __call__(self, step: PackedStep) -> Tensor:
        with self.adapters.acting(step):
            return self.model(step)


def _places(spans: Sequence[tuple[int, int]], device: torch.device) -> slice | Tensor:
    if len(spans) == 1:
        return slice(*spans[0])
    return sent(torch.cat([torch.arange(*span) for span in spans]), device)


@dataclass(slots=True)
class _Change:
    """All that the adapters have for one module, by their numbers."""

    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # A_RD, B_RO
    own: dict[int, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    rows: dict[int, tuple[Sequence[int], Tensor]] = field(default_factory=dict)


@torch.no_grad()
def put_adapters(
    model: nn.Module, adapters: Mapping[str, Adapter], family: Family
) -> ServedAdapters:
    """Put adapters that fit (`check_adapter_fits`) on a model, by name, for inference.

    The modules that they change are replaced in place, in the dtype and on the device of the
    base's. A default adapter without others takes the base's place where it replaces tensors.
    UserError: a value that is not finite, or a copy of a base's tensor that differs from it.
    """
    served, changes = ServedAdapters(list(adapters)), defaultdict[str, _Change](_Change)
    for adapter in adapters.values():
        check_copies(adapter, dict(model.named_parameters()))
    takes_over = list(adapters) == [DEFAULT]
    for number, adapter in enumerate(adapters.values(), start=1):
        _collect(changes, number, adapter, model, takes_over)
    for module, change in changes.items():
        base, count = model.get_submodule(module), len(adapters)
        adapted = AdaptedModule(base, served.step, is_head=module == family.head)
        weight = base.get_parameter("weight")
        if change.own:
            adapted.own = OwnTensors(change.own)
        if change.pairs:
            adapted.parts.append(LoraPart.of(change.pairs, count, weight))
        if change.rows and module == family.embedding:
            adapted.parts.append(OwnEmbeddingRows.of(change.rows, count, weight))
        elif change.rows:
            adapted.parts.append(OwnHeadRows.of(change.rows, weight))
        model.set_submodule(module, adapted)
    return served


def _collect(
    changes: dict[str, _Change],
    number: int,
    adapter: Adapter,
    model: nn.Module,
    takes_over: bool,
) -> None:
    """Sort one adapter's tensors by the module that they change; or let those that replace the
    base's take their place in it."""
    state, copied_bytes = adapter.state_dict(), 0

    def replace(name: str, tensor: Tensor) -> None:
        own, (module, _, parameter) = model.get_parameter(name), name.rpartition(".")
        if takes_over:
            own.copy_(tensor)
        else:
            changes[module].own[number][parameter] = tensor.to(own)

    for module, pair in adapter.pairs.items():
        weight_OD = model.get_parameter(f"{module}.weight")
        a_RD = state[pair.a_key].to(weight_OD.device).float()
        b_OR = state[pair.b_key].to(weight_OD.device).float() * pair.scaling
        if pair.magnitude_key is not None:
            changed_OD = weight_OD.float().addmm(b_OR, a_RD)
            magnitude_O = state[pair.magnitude_key].to(changed_OD)
            changed_OD *= (magnitude_O / torch.linalg.vector_norm(changed_OD, dim=1))[:, None]
            replace(f"{module}.weight", changed_OD)
            copied_bytes += weight_OD.nbytes
            continue
        a_RD, b_RO = a_RD.to(weight_OD.dtype), b_OR.T.to(weight_OD.dtype)
        # An infinite B would make NaN out of the zeros of other adapters' tokens, too.
        if not (a_RD.isfinite().all() and b_RO.isfinite().all()):
            came = f"{pair.b_key} times its scaling overflows {weight_OD.dtype}"
            raise UserError(f"{adapter.folder}: {came}; expected --dtype bfloat16 or float32")
        changes[module].pairs[number] = a_RD, b_RO
    for name, key in adapter.saved.items():
        replace(name, state[key])
    for module, rows in adapter.token_rows.items():
        weight = model.get_parameter(f"{module}.weight")
        if takes_over:
            weight[list(rows.indices)] = state[rows.key].to(weight)
        else:
            changes[module].rows[number] = rows.indices, state[rows.key].to(weight)
    if copied_bytes and not takes_over:
        copies = f"copies of its layers, {copied_bytes / 1e9:.1f} GB"
        say(f"{adapter.folder}: DoRA is merged into {copies}")
