"""Adapters in PEFT's format: read without a model, checked against a base, loaded onto a model.

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
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qwen_ds.disk.adapter_folder import (
    CONFIG_NAME,
    PICKLE_NAMES,
    WEIGHTS_NAME,
    open_weights,
    read_config,
)
from qwen_ds.errors import UserError
from qwen_ds.model import adapter_keys

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The options of a configuration that change what its tensors do to the base.
_MEANING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias")


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The low-rank change of one module: weight_OI + scaling * B_OR @ A_RI; for DoRA (Liu et al.
    2024, arXiv:2402.09353) its rows are then scaled to the magnitudes."""

    a_key: str  # of A_RI
    b_key: str  # of B_OR
    magnitude_key: str | None  # of the magnitudes [O] of a DoRA adapter
    r: int
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
    # Base tensor -> the key of what takes its place (modules_to_save, trained biases).
    saved: dict[str, str]
    token_rows: dict[str, ReplacedTokenRows]  # by module
    # Base tensor -> the key of an unchanged copy. peft stores one of the head, unasked, if LoRA is
    # on the head.
    copies: dict[str, str]
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
        with safe_open(self.folder / WEIGHTS_NAME, framework="pt") as file:
            if first == 0 and last is None:
                return file.get_tensor(name).clone()
            return file.get_slice(name)[first:last].clone()

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
        if (rows := self.token_rows.get(module)) and (
            here := [i for i in rows.indices if i in place]
        ):
            tensors[rows.key] = self.tensor(rows.key)[[rows.indices.index(i) for i in here]]
            token_rows = {module: ReplacedTokenRows(rows.key, tuple(place[i] for i in here))}
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return replace(
            self, pairs=pairs, saved=saved, token_rows=token_rows, copies={}, shapes=shapes,
            _names_in_file={key: key for key in tensors}, _loaded=tensors,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors under peft's keys, for `peft.set_peft_model_state_dict`."""
        return {key: self.tensor(key) for key in self.shapes}

    def files(self) -> list[Path]:
        """The files that the adapter was read from."""
        names = (CONFIG_NAME, *(PICKLE_NAMES if self._loaded is not None else (WEIGHTS_NAME,)))
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def changed_tensors(self) -> list[str]:
        """Names of the base's tensors that this adapter changes."""
        modules = [f"{module}.weight" for module in (*self.pairs, *self.token_rows)]
        return sorted({*modules, *self.saved})


def read_adapter(folder: Path | str, *, allow_pickle: bool = False, alpha: float = 16.0) -> Adapter:
    """Read names, shapes and configuration of the adapter in `folder`.

    UserError: no adapter here, not LoRA, an option that cannot be honoured, or a tensor that is
    unknown, without its partner, empty, or not of the configured rank.

    Args:
        allow_pickle: also accept `adapter_model.bin` and `pytorch_model.bin`, read with
            `weights_only=True`; these need no adapter_config.json, as shapes give the ranks.
        alpha: lora_alpha of an adapter without a configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        expected = f"an adapter folder with {CONFIG_NAME} and {WEIGHTS_NAME}"
        raise UserError(f"{folder}: no such folder; expected {expected}")
    config = read_config(folder)
    loaded, shapes_in_file = open_weights(folder, allow_pickle)
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
    shapes = {key: shapes_in_file[name] for key, name in names.items() if key not in copied}
    adapter_keys.check_pairs(folder, parts, shapes)
    if config is None:
        config = adapter_keys.inferred_config(parts, shapes, alpha)
    pairs, rows, saved = dict[str, LoraPair](), dict[str, ReplacedTokenRows](), dict[str, str]()
    for module, keys in parts.items():
        if "lora_A" in keys:
            pairs[module] = _pair(folder, config, module, keys, shapes[keys["lora_A"]])
        if (key := keys.get("rows")) is not None:
            indices = adapter_keys.token_indices(folder, config, module, shapes[key][0])
            rows[module] = ReplacedTokenRows(key, indices)
        saved |= {f"{module}.{kind}": keys[kind] for kind in ("weight", "bias") if kind in keys}
    for module in (*pairs, *rows):
        if f"{module}.weight" in saved or (module in pairs and module in rows):
            raise UserError(
                f"{folder}: {module} is changed in two ways; expected one of LoRA, token rows, "
                "saved module"
            )
    return Adapter(folder, config, pairs, saved, rows, copies, shapes, names, loaded)


def check_adapter_fits(adapter: Adapter, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare every tensor of the adapter with the base's shapes (parameter name -> shape).
    UserError names the first one that does not fit, its shape and the base's."""
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
    for name, key in adapter.saved.items():
        require(key, weight_shape(name, key), name)
    for module, rows in adapter.token_rows.items():
        name = f"{module}.weight"
        shape = weight_shape(name, rows.key)
        require(rows.key, (len(rows.indices), *shape[1:]), name)
        if (last := max(rows.indices)) >= shape[0]:
            came = f"{rows.key} replaces row {last}"
            raise UserError(f"{folder}: {came}; {name} has {shape[0]} rows")


@torch.no_grad()
def put_adapter(module: nn.Module, adapter: Adapter) -> PeftModel | None:
    """Put the adapter's parts for `module` in place, in fp32.

    Saved tensors and token rows overwrite the module's, and peft wraps the linear layers that LoRA
    is on. `module` may be a part of a model, if its modules are named as in the whole model. The
    result is the wrapped module in eval mode; None if LoRA is on none of its layers.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    parameters = dict(module.named_parameters())
    for name in adapter.saved.keys() & parameters.keys():
        parameters[name].copy_(adapter.tensor(adapter.saved[name]))
    for owner, rows in adapter.token_rows.items():
        if f"{owner}.weight" in parameters:
            parameters[f"{owner}.weight"][list(rows.indices)] = adapter.tensor(rows.key).float()
    here = sorted({name for name, _ in module.named_modules()} & adapter.pairs.keys())
    if not here:
        return None
    options = {key: adapter.config[key] for key in _MEANING if key in adapter.config}
    # Layers are named in full: for a pattern, peft would expect every module that matches it.
    wrapped = PeftModel(module, LoraConfig(target_modules=here, **options))
    pairs = [adapter.pairs[name] for name in here]
    keys = (key for pair in pairs for key in (pair.a_key, pair.b_key, pair.magnitude_key))
    state = {key: adapter.tensor(key).float() for key in keys if key is not None}
    unknown = set_peft_model_state_dict(wrapped, state).unexpected_keys  # type: ignore[attr-defined]
    assert not unknown, f"{adapter.folder}: peft does not take {unknown[0]}"
    return wrapped.eval()


def load_adapter(model: PreTrainedModel, folder: Path | str) -> PeftModel:
    """Put the adapter in `folder` (a stock PEFT folder) onto `model` for inference, in eval mode.

    The model's modules are wrapped in place. LoRA matrices stay fp32; the rest keeps its dtype.
    UserErrors are those of `read_adapter` and `check_adapter_fits`.
    """
    from peft import PeftModel

    adapter = read_adapter(folder)
    check_adapter_fits(adapter, {name: tuple(p.shape) for name, p in model.named_parameters()})
    # The model's own device: peft by itself would put the adapter on the first GPU that it sees.
    return PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device)).eval()


def _pair(
    folder: Path, config: dict[str, Any], module: str, keys: dict[str, str], came: tuple[int, ...]
) -> LoraPair:
    of_module = adapter_keys.pattern_value
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
    return LoraPair(keys["lora_A"], keys["lora_B"], magnitude, r, scaling)
