"""LoRA for training: peft makes and names the adapter, the branch itself is computed our way.

peft casts the activations up to the adapter's fp32, which is slow and keeps fp32 copies for the backward pass. Here the
two small matrices are cast down to the activations' dtype instead, so the branch runs at the base's speed while the
parameters, their gradients and AdamW's state stay fp32 (test_the_branch_computes_in_the_activations_dtype).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners import lora as peft_lora
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from qwen_ds.errors import UserError
from qwen_ds.model.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    check_adapter_fits,
    read_adapter,
)
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train.special_rows import EmbeddingWithRows, HeadWithRows
from qwen_ds.train.survive.checkpoint import write_tensors, write_text

ADAPTER = "default"
KNOWN_TARGETS = ("c_attn", "c_proj", "attn.c_proj", "mlp.c_proj", "w1", "w2")
SAVEABLE = ("wte", "lm_head")


class CastLinear(nn.Linear):
    """A bias-free linear map whose fp32 weight is used in the input's dtype. A module, so that ZeRO-3 gathers it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class CastEmbedding(nn.Embedding):
    """An embedding whose fp32 weight gives activations of the base's dtype."""

    def __init__(self, weight_VD: nn.Parameter, activations_dtype: torch.dtype) -> None:
        super().__init__(weight_VD.shape[0], weight_VD.shape[1], device="meta")
        self.weight = weight_VD
        self.activations_dtype = activations_dtype

    def forward(self, ids_BT: Tensor) -> Tensor:
        return super().forward(ids_BT).to(self.activations_dtype)


def drop(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Dropout on a CPU, which draws random numbers one after another: x with zeros, and the share that is kept, by
    which the caller divides. One draw of 64 bits decides on four numbers, so p is rounded to a multiple of 2^-16;
    2048 x 512 numbers took 16 ms with torch's dropout and 3 ms so."""
    dropped = round(p * 2**16)
    draws = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), dtype=torch.int64)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return torch.where(keep, x, 0.0), 1 - dropped / 2**16


class LoraLinear(peft_lora.Linear):
    """peft's LoRA linear with the branch in the activations' dtype; x is [..., in], the result [..., out]."""

    cast_input_dtype_enabled = False  # read by peft: leave x alone

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        for matrices in (self.lora_A, self.lora_B):
            made = matrices[adapter_name]
            assert isinstance(made, nn.Linear)
            cast = CastLinear(made.in_features, made.out_features, bias=False, device="meta")
            cast.weight = made.weight
            matrices[adapter_name] = cast

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (
            self.disable_adapters
            or self.merged
            or self.lora_variant
            or self.active_adapters != [ADAPTER]
        ):
            return super().forward(x, *args, **kwargs)
        scale, dropout = self.scaling[ADAPTER], self.lora_dropout[ADAPTER]
        dropped = x
        if isinstance(dropout, nn.Dropout) and dropout.training:
            if x.device.type == "cpu":
                dropped, share_kept = drop(x, dropout.p)
                scale /= share_kept
            else:
                dropped = dropout(x)
        # The scale goes on the r-wide middle, not on the wide result: one pass less over memory.
        middle = self.lora_A[ADAPTER](dropped) * scale
        return self.base_layer(x) + self.lora_B[ADAPTER](middle)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} trainable of {self.total:,} parameters ({share:.3f} %)"


def lora_config(options: LoraOptions, base: str) -> LoraConfig:
    """The PEFT configuration of a recipe."""
    unknown = [t for t in options.targets if t not in KNOWN_TARGETS]
    if unknown or not options.targets:
        came = unknown[0] if unknown else "nothing"
        raise UserError(
            f"lora.targets: {came!r} matches no module; expected some of {', '.join(KNOWN_TARGETS)}"
        )
    if other := next((name for name in options.modules_to_save if name not in SAVEABLE), None):
        raise UserError(
            f"lora.modules_to_save: {other!r} came; expected some of {', '.join(SAVEABLE)}"
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=sorted(options.targets),
        use_rslora=options.variant == "rslora",
        use_dora=options.variant == "dora",
    )


def add_lora(
    model: QWenLMHeadModel,
    options: LoraOptions,
    *,
    base: str,
    seed: int,
    row_ids: Sequence[int] = (),
) -> PeftModel:
    """Wrap `model` with a fresh adapter (A random from `seed`, alike on every rank; B zero), fp32 and trainable.

    `model` may be partitioned by ZeRO-3; what starts from the base's weights then comes from the gathered ones: DoRA's
    magnitudes, `options.modules_to_save` and the rows `row_ids` of wte and lm_head, which are trained where given.
    """
    config = lora_config(options, base)
    config._register_custom_module({nn.Linear: LoraLinear})
    torch.manual_seed(seed)
    wrapped = PeftModel(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    config._custom_modules = None  # not part of the file format
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # peft's own wrappers keep a frozen copy of a saved module and copy the matrix for some rows of it, at every
    # forward. Of peft's these have the names and the configuration.
    transformer = model.transformer
    if row_ids:
        with gather_params_ctx(transformer.wte.parameters(), modifier_rank=None):
            transformer.wte = EmbeddingWithRows(transformer.wte, row_ids)
        with gather_params_ctx(model.lm_head.parameters(), modifier_rank=None):
            model.lm_head = HeadWithRows(model.lm_head, row_ids)
        config_of(wrapped).trainable_token_indices = {name: list(row_ids) for name in SAVEABLE}
    if "wte" in options.modules_to_save:
        transformer.wte = CastEmbedding(
            _fp32_copy(transformer.wte.weight), transformer.wte.weight.dtype
        )
    if "lm_head" in options.modules_to_save:
        cast = CastLinear(
            model.lm_head.in_features, model.lm_head.out_features, bias=False, device="meta"
        )
        cast.weight = _fp32_copy(model.lm_head.weight)
        model.lm_head = cast
    config_of(wrapped).modules_to_save = list(options.modules_to_save) or None
    return wrapped


def _fp32_copy(weight: Tensor) -> nn.Parameter:
    assert isinstance(weight, nn.Parameter)
    with gather_params_ctx([weight], modifier_rank=None):
        return nn.Parameter(weight.detach().to(torch.float32, copy=True))


def borrowed_weights(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Modules that read a weight of their child's directly: DoRA takes the norms of the base's rows."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and module.lora_variant:
            base = module.get_base_layer()
            assert isinstance(base, nn.Linear)
            assert isinstance(base.weight, nn.Parameter)
            yield module, base.weight


def config_of(wrapped: PeftModel) -> LoraConfig:
    """The configuration that belongs into adapter_config.json."""
    config = wrapped.peft_config[ADAPTER]
    assert isinstance(config, LoraConfig)
    return config


def init_from(wrapped: PeftModel, folder: str, options: LoraOptions) -> None:
    """Continue from another adapter: its values replace the fresh ones.

    Ours, the official finetune.py's and LLaMA-Factory's (stock PEFT folders), and the original project's
    `pytorch_model.bin` are read. Saved modules and token rows that the adapter lacks start from the base's, as in it.

    Raises:
        UserError: it has other modules or rows, another rank or another scale than the recipe says; the first is named.
    """
    own = {plain_name(name): p for name, p in wrapped.named_parameters() if p.requires_grad}
    adapter = read_adapter(folder, allow_pickle=True, alpha=options.alpha)
    base = wrapped.get_base_model().named_parameters()
    check_adapter_fits(
        adapter, {name.replace(".base_layer.", "."): _full_shape(p) for name, p in base}
    )
    for name in sorted(set(own) ^ set(adapter.shapes)):
        if name in own and ".lora_" not in name:
            continue
        side = (
            "the recipe trains it and the adapter lacks it"
            if name in own
            else "the recipe does not train it"
        )
        keys = (
            "lora.targets and lora.variant"
            if ".lora_" in name
            else "lora.modules_to_save and lora.special_rows"
        )
        raise UserError(
            f"lora.init_from {folder}: {name}: {side}; make {keys} match, or merge it into the base (launch/merge.py) "
            f"and start from the merged model"
        )
    scaling = options.alpha / (math.sqrt(options.r) if options.variant == "rslora" else options.r)
    for module, pair in adapter.pairs.items():
        if not math.isclose(pair.scaling, scaling):
            raise UserError(
                f"lora.init_from {folder}: {module} is scaled by {pair.scaling:g}; the recipe's lora.alpha and lora.r "
                f"say {scaling:g}; expected the same"
            )
    theirs = adapter.state_dict()
    _order_token_rows(theirs, adapter, config_of(wrapped))
    for name, tensor in theirs.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"lora.init_from {folder}: {name} is {list(tensor.shape)}; expected {list(own[name].shape)} (lora.r)"
            )
        own[name].data.copy_(tensor)


def _order_token_rows(tensors: dict[str, Tensor], adapter: Adapter, config: LoraConfig) -> None:
    """Bring the adapter's token rows into the order in which the recipe trains them."""
    trained = config.trainable_token_indices
    for module, rows in adapter.token_rows.items():
        assert isinstance(
            trained, dict
        )  # the recipe trains rows of each module: the names were compared
        wanted = trained[module.rpartition(".")[2]]
        if sorted(wanted) != sorted(rows.indices):
            raise UserError(
                f"lora.init_from {adapter.folder}: it trains the rows {sorted(rows.indices)} of {module}; "
                f"expected {sorted(wanted)} (lora.special_rows)"
            )
        tensors[rows.key] = tensors[rows.key][[rows.indices.index(i) for i in wanted]]


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Its shape, also while ZeRO-3 holds it in pieces."""
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def plain_name(name: str) -> str:
    """A parameter's name in the adapter file: without the adapter's own name."""
    if "lora_magnitude_vector" in name:
        return name.removesuffix(f".{ADAPTER}.weight")
    return name.replace(f".{ADAPTER}.weight", ".weight")


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable and total parameters; works on meta tensors and on ZeRO-3's partitioned ones (ds_numel)."""

    def numel(p: nn.Parameter) -> int:
        return int(p.ds_numel) if hasattr(p, "ds_numel") else p.numel()

    parameters = list(model.parameters())
    return ParameterCount(
        sum(numel(p) for p in parameters if p.requires_grad), sum(map(numel, parameters))
    )


def write_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Write a stock PEFT folder: adapter_config.json and adapter_model.safetensors, mode 0644.

    Args:
        folder: made if it is missing.
        tensors: complete fp32 values by the wrapped model's parameter names.

    Returns:
        file name -> sha256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        assert tensor.numel() > 0, f"{name} is empty: it was saved while ZeRO-3 held it partitioned"
    written = config.to_dict() | {"inference_mode": True}
    for key, value in written.items():
        if isinstance(value, set):
            written[key] = sorted(value)
    weights = {plain_name(name): tensor for name, tensor in tensors.items()}
    return {
        WEIGHTS_NAME: write_tensors(folder / WEIGHTS_NAME, weights),
        CONFIG_NAME: write_text(
            folder / CONFIG_NAME, json.dumps(written, indent=2, default=str) + "\n"
        ),
    }
