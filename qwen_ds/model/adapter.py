"""Adapters in PEFT's format: read without a model, and checked against a base.

Accepted are the folders of any version of peft (ours, the official finetune.py's, LLaMA-Factory's)
and, where the caller allows pickles, the bare `pytorch_model.bin` or `adapter_model.bin` of older
projects. All use one set of names: the base's module names, without prefixes and adapter names.

Shapes: O output features, I input features, R rank, N selected rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_ds.disk.adapter_folder import (
    CONFIG_NAME,
    PICKLE_NAMES,
    WEIGHTS_NAME,
    find_adapter,
    open_weights,
    read_config,
)
from qwen_ds.disk.weights import open_tensors
from qwen_ds.errors import UserError
from qwen_ds.model import adapter_keys
from qwen_ds.model.adapter_asked import asked
from qwen_ds.model.adapter_patterns import Patterns
from qwen_ds.model.family import QWEN


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The low-rank change of one module: weight_OI + scaling * B_OR @ A_RI; for DoRA (Liu et al.
    2024, arXiv:2402.09353) its rows are then scaled to the magnitudes."""

    a_key: str  # of A_RI
    b_key: str  # of B_OR
    magnitude_key: str | None  # of the magnitudes [O] of a DoRA adapter
    r: int
    alpha: float
    scaling: float


@dataclass(frozen=True, slots=True)
class ReplacedTokenRows:
    """Single rows of an embedding or head that the adapter replaces: values [N, I] at `indices`."""

    key: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk: its names, shapes and scalings. Tensors are read when asked for.

    Base tensors and modules go by their names, the adapter's tensors by the keys of current peft.
    """

    folder: Path
    config: dict[str, Any]  # adapter_config.json; inferred where the folder has none
    pairs: dict[str, LoraPair]  # by module
    # Base tensor -> the key of what takes its place: modules_to_save, trained biases, and copies
    # of embedding and head that peft's save_embedding_layers adds unasked.
    saved: dict[str, str]
    token_rows: dict[str, ReplacedTokenRows]  # by module
    # Base tensor -> the key of an unchanged copy. peft stores one of the head, unasked, if LoRA is
    # on the head.
    copies: dict[str, str]
    copy_shapes: dict[str, tuple[int, ...]]  # by base tensor
    shapes: dict[str, tuple[int, ...]]  # by key, without those of copies
    _names_in_file: dict[str, str]
    # The tensors in memory, as a pickle's are; None: they are read from the safetensors file.
    _loaded: Mapping[str, Tensor] | None

    def tensor(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """The tensor under `key`, or its rows [first:last]: a copy, in the dtype on disk."""
        name = self._names_in_file[key]
        if self._loaded is not None:
            whole = self._loaded[name]
            return whole[first:last].clone() if whole.ndim else whole.clone()
        with open_tensors(self.folder / WEIGHTS_NAME) as file:
            is_whole = first == 0 and last is None
            part: Tensor = file.get_tensor(name) if is_whole else file.get_slice(name)[first:last]
            return part.clone()

    def of_rows(self, name: str, indices: Sequence[int]) -> Adapter:
        """The adapter of a module that has only these rows of the base's tensor `name`, in this
        order. Its tensors are in memory."""
        module, tensors = name.removesuffix(".weight"), dict[str, Tensor]()

        def pick(key: str) -> str:
            if isinstance(indices, range) and len(indices):
                tensors[key] = self.tensor(key, indices[0], indices[-1] + 1)
            else:
                tensors[key] = torch.cat([self.tensor(key, i, i + 1) for i in indices])
            return key

        saved = {name: pick(self.saved[name])} if name in self.saved else {}
        pairs = {module: self.pairs[module]} if module in self.pairs else {}
        for pair in pairs.values():
            tensors[pair.a_key] = self.tensor(pair.a_key)
            pick(pair.b_key)
            if pair.magnitude_key is not None:
                pick(pair.magnitude_key)
        token_rows = {}
        place = {index: i for i, index in enumerate(indices)}
        if rows := self.token_rows.get(module):
            here = {at: place[i] for at, i in enumerate(rows.indices) if i in place}
            if here:
                tensors[rows.key] = self.tensor(rows.key)[list(here)]
                token_rows = {module: ReplacedTokenRows(rows.key, tuple(here.values()))}
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return replace(
            self, pairs=pairs, saved=saved, token_rows=token_rows, copies={}, copy_shapes={},
            shapes=shapes, _names_in_file={key: key for key in tensors}, _loaded=tensors,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors under peft's keys, for `peft.set_peft_model_state_dict`. UserError names one
        with a value that is not finite."""
        found = {}
        for key in self.shapes:
            found[key] = tensor = self.tensor(key)
            if not tensor.float().isfinite().all():
                raise UserError(
                    f"{self.folder}: {key} holds NaN or infinity; expected a trained adapter"
                )
        return found

    def is_end(self, key: str) -> bool:
        """Whether `key` is the embedding or the head, by its own name in the file: peft loads such
        a tensor whatever the configuration says (it may have stored it unasked, see `copies`)."""
        ends = [f"{adapter_keys.PEFT_PREFIX}{end}.weight" for end in (QWEN.embedding, QWEN.head)]
        return key in ends and "modules_to_save" not in self._names_in_file[key]

    def files(self) -> list[Path]:
        """The files that the adapter was read from."""
        names = (CONFIG_NAME, *(PICKLE_NAMES if self._loaded is not None else (WEIGHTS_NAME,)))
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def changed_tensors(self) -> list[str]:
        """Names of the base's tensors that this adapter changes."""
        modules = [f"{module}.weight" for module in (*self.pairs, *self.token_rows)]
        return sorted({*modules, *self.saved})


def read_adapter(
    folder: Path | str,
    *,
    allow_pickle: bool = False,
    alpha: float = 16.0,
    option: str = "--allow_pickle",
) -> Adapter:
    """Read names, shapes and configuration of the adapter in `folder`, or in a run's `adapter/`.

    UserError: no adapter here, not LoRA, an option that cannot be honoured, or a tensor that is
    unknown, without its partner, empty, or not of the configured rank.

    Args:
        allow_pickle: also accept `adapter_model.bin` and `pytorch_model.bin`, read with
            `weights_only=True`; these need no adapter_config.json, as shapes give the ranks.
        alpha: lora_alpha of an adapter without a configuration.
        option: the option that allows pickles, for messages.
    """
    folder = find_adapter(folder)
    config = read_config(folder)
    loaded, shapes_in_file = open_weights(folder, allow_pickle, option)
    if config is None and loaded is None:
        raise UserError(
            f"{folder}: no {CONFIG_NAME}; expected a PEFT adapter folder, which has one beside its "
            "weights"
        )

    names, parts = adapter_keys.sort_keys(folder, shapes_in_file)
    if not parts:
        raise UserError(
            f"{folder}: the weights hold no tensor; expected lora_A and lora_B of some modules"
        )
    copies = {
        f"{module}.weight": keys.pop("weight")
        for module, keys in parts.items()
        if "lora_A" in keys and names.get(keys.get("weight", ""), "").endswith(".base_layer.weight")
    }
    copied = set(copies.values())
    copy_shapes = {tensor: shapes_in_file[names[key]] for tensor, key in copies.items()}
    shapes = {key: shapes_in_file[name] for key, name in names.items() if key not in copied}
    adapter_keys.check_pairs(folder, parts, shapes)
    if config is None:
        config = adapter_keys.inferred_config(parts, shapes, alpha)
    pairs, rows, saved = dict[str, LoraPair](), dict[str, ReplacedTokenRows](), dict[str, str]()
    patterns = Patterns(folder)
    for module, keys in parts.items():
        if "lora_A" in keys:
            pairs[module] = _pair(patterns, config, module, keys, shapes[keys["lora_A"]])
        if (key := keys.get("rows")) is not None:
            shape = shapes[key]
            if len(shape) != 2:
                raise UserError(f"{folder}: {key} is {list(shape)}; expected a row for each token")
            if indices := adapter_keys.token_indices(folder, config, module, shape[0]):
                rows[module] = ReplacedTokenRows(key, indices)
            else:
                del shapes[key]  # peft's tensor for an empty list of rows
        saved |= {f"{module}.{kind}": keys[kind] for kind in ("weight", "bias") if kind in keys}
    for module in (*pairs, *rows):
        if f"{module}.weight" in saved or (module in pairs and module in rows):
            raise UserError(
                f"{folder}: {module} is changed in two ways; expected one of LoRA, token rows, "
                "saved module"
            )
    return Adapter(folder, config, pairs, saved, rows, copies, copy_shapes, shapes, names, loaded)


def check_adapter_fits(
    adapter: Adapter, base_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Compare every tensor of the adapter with the base's shapes (parameter name -> shape), and
    with what the configuration asks for on this base.

    Returns what the configuration says in vain, a line each. UserError names the first tensor that
    does not fit, with its shape and the base's; that is asked for and missing; or unasked.
    """
    folder = adapter.folder

    def weight_shape(name: str, key: str) -> tuple[int, ...]:
        if name not in base_shapes:
            raise UserError(f"{folder}: {key} changes {name}, which this base does not have")
        return base_shapes[name]

    def require(key: str, expected: tuple[int, ...], name: str) -> None:
        if adapter.shapes[key] != expected:
            raise UserError(
                f"{folder}: {key} is {list(adapter.shapes[key])}; expected {list(expected)}, since "
                f"the base's {name} is {list(base_shapes[name])}: an adapter of another base"
            )

    for module, pair in adapter.pairs.items():
        name = f"{module}.weight"
        shape = weight_shape(name, pair.a_key)
        if len(shape) != 2:
            came = f"{pair.a_key} changes {name} of shape {list(shape)}"
            raise UserError(f"{folder}: {came}; expected a matrix")
        require(pair.a_key, (pair.r, shape[1]), name)
        require(pair.b_key, (shape[0], pair.r), name)
        if pair.magnitude_key is not None:
            require(pair.magnitude_key, (shape[0],), name)
    for name, shape in adapter.copy_shapes.items():
        if shape != base_shapes[name]:
            raise UserError(
                f"{folder}: its copy of {name} is {list(shape)}; expected"
                f" {list(base_shapes[name])}, as in the base: an adapter of another base"
            )
    for name, key in adapter.saved.items():
        require(key, weight_shape(name, key), name)
    for module, rows in adapter.token_rows.items():
        name = f"{module}.weight"
        shape = weight_shape(name, rows.key)
        require(rows.key, (len(rows.indices), *shape[1:]), name)
        if (last := max(rows.indices)) >= shape[0]:
            came = f"{rows.key} replaces row {last}"
            raise UserError(f"{folder}: {came}; {name} has {shape[0]} rows")
    return _check_asked(adapter, base_shapes)


def _check_asked(adapter: Adapter, base_shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    folder, key = adapter.folder, adapter_keys.PEFT_PREFIX.__add__
    if not (folder / CONFIG_NAME).exists():
        return ()  # the configuration was made from the tensors
    wanted = asked(folder, adapter.config, base_shapes)
    needed = {f"{module}.lora_A.weight": "target_modules" for module in wanted.targets}
    needed |= wanted.saved
    needed |= {
        f"{module}.{adapter_keys.ROWS}": "trainable_token_indices" for module in wanted.token_rows
    }
    for name, option in sorted(needed.items()):
        if key(name) not in adapter.shapes:
            raise UserError(
                f"{folder}: the weights lack {key(name)}, which {option} in {CONFIG_NAME} asks for;"
                " expected all tensors of a trained adapter (saved only in part?)"
            )
    unasked = [pair.a_key for module, pair in adapter.pairs.items() if module not in wanted.targets]
    unasked += [rows.key for m, rows in adapter.token_rows.items() if m not in wanted.token_rows]
    unasked += [
        k for name, k in adapter.saved.items() if name not in wanted.saved and not adapter.is_end(k)
    ]
    if unasked:
        raise UserError(
            f"{folder}: the weights hold {unasked[0]}, which nothing in {CONFIG_NAME} asks for and"
            " peft would not load; expected a configuration that belongs to them"
        )
    return wanted.notes


def _pair(
    patterns: Patterns, config: dict[str, Any], module: str, keys: dict[str, str],
    came: tuple[int, ...],
) -> LoraPair:  # fmt: skip
    folder, of_module = patterns.folder, patterns.value
    r = int(of_module(config.get("rank_pattern"), module, config["r"]))
    if came[0] != r:
        raise UserError(
            f"{folder}: {keys['lora_A']} is {list(came)}; expected rank {r}, as {CONFIG_NAME} says"
        )
    alpha = float(of_module(config.get("alpha_pattern"), module, config["lora_alpha"]))
    magnitude, use_dora = keys.get("lora_magnitude_vector"), bool(config.get("use_dora"))
    if (magnitude is not None) != use_dora:
        raise UserError(
            f"{folder}: {module} comes {'without' if magnitude is None else 'with'} "
            f"lora_magnitude_vector; {CONFIG_NAME} says use_dora {use_dora}"
        )
    # Rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) divides by the root of the rank.
    scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return LoraPair(keys["lora_A"], keys["lora_B"], magnitude, r, alpha, scaling)
