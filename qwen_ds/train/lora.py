"""LoRA for training: peft makes and names the adapter, the branch itself is computed our way.

peft casts the activations up to the adapter's fp32, which is slow and keeps fp32 copies for the backward pass. Here the
two small matrices are cast down to the activations' dtype instead, so the branch runs at the base's speed while the
parameters, their gradients and AdamW's state stay fp32 (test_the_branch_computes_in_the_activations_dtype).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners import lora as peft_lora
from torch import Tensor, nn

from qwen_ds.config import LoraOptions
from qwen_ds.errors import UserError
from qwen_ds.model.adapter import CONFIG_NAME, WEIGHTS_NAME, check_adapter_fits, read_adapter
from qwen_ds.train.checkpoint import write_tensors, write_text

ADAPTER = "default"
KNOWN_TARGETS = ("c_attn", "c_proj", "attn.c_proj", "mlp.c_proj", "w1", "w2")


class CastLinear(nn.Linear):
    """A bias-free linear map whose fp32 weight is used in the input's dtype. A module, so that ZeRO-3 gathers it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


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
        if self.disable_adapters or self.merged or self.lora_variant or self.active_adapters != [ADAPTER]:
            return super().forward(x, *args, **kwargs)
        # The scale goes on the r-wide middle, not on the wide result: one pass less over memory.
        middle = self.lora_A[ADAPTER](self.lora_dropout[ADAPTER](x)) * self.scaling[ADAPTER]
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
        raise UserError(f"lora.targets: {came!r} matches no module; expected some of {', '.join(KNOWN_TARGETS)}")
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


def add_lora(model: nn.Module, options: LoraOptions, *, base: str, seed: int) -> PeftModel:
    """Wrap `model` with a fresh adapter (A random from `seed`, alike on every rank; B zero), fp32 and trainable.

    `model` may be partitioned by ZeRO-3; DoRA's magnitudes then come from the gathered weights.
    """
    config = lora_config(options, base)
    config._register_custom_module({nn.Linear: LoraLinear})
    torch.manual_seed(seed)
    wrapped = PeftModel(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    config._custom_modules = None  # not part of the file format
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


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
    `pytorch_model.bin` are read.

    Raises:
        UserError: it has other modules, another rank or another scale than the recipe says; the first is named.
    """
    own = {plain_name(name): p for name, p in wrapped.named_parameters() if p.requires_grad}
    adapter = read_adapter(folder, allow_pickle=True, alpha=options.alpha)
    if adapter.saved or adapter.token_rows:
        name = next(iter(adapter.saved or adapter.token_rows))
        raise UserError(
            f"lora.init_from {folder}: it also replaces {name}, which LoRA does not train here; merge it into the base "
            f"(launch/merge.py) and start from the merged model"
        )
    base = wrapped.get_base_model().named_parameters()
    check_adapter_fits(adapter, {name.replace(".base_layer.", "."): _full_shape(p) for name, p in base})
    scaling = options.alpha / (math.sqrt(options.r) if options.variant == "rslora" else options.r)
    for module, pair in adapter.pairs.items():
        if not math.isclose(pair.scaling, scaling):
            raise UserError(
                f"lora.init_from {folder}: {module} is scaled by {pair.scaling:g}; the recipe's lora.alpha and lora.r "
                f"say {scaling:g}; expected the same"
            )
    theirs = adapter.state_dict()
    for name in sorted(set(own) ^ set(theirs)):
        side = "the recipe trains it and the adapter lacks it" if name in own else "the recipe does not train it"
        raise UserError(f"lora.init_from {folder}: {name}: {side}; make lora.targets and lora.variant match")
    for name, parameter in own.items():
        tensor = theirs[name]
        if tensor.shape != parameter.shape:
            raise UserError(
                f"lora.init_from {folder}: {name} is {list(tensor.shape)}; expected {list(parameter.shape)} (lora.r)"
            )
        parameter.data.copy_(tensor)


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
    return ParameterCount(sum(numel(p) for p in parameters if p.requires_grad), sum(map(numel, parameters)))


def write_adapter(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, str]:
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
        CONFIG_NAME: write_text(folder / CONFIG_NAME, json.dumps(written, indent=2, default=str) + "\n"),
    }
