"""LoRA for training: peft makes and names the adapter, and the branch is computed here.

peft casts the activations up to the adapter's fp32, which is slow and keeps fp32 copies for the
backward pass. Here the two small matrices are cast down to the activations' dtype instead: the
branch runs at the base's speed, while the parameters, their gradients and AdamW's state stay fp32
(test_the_branch_computes_in_the_activations_dtype).
"""

from __future__ import annotations

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

from qwen_ds.disk.weights import save_tensors
from qwen_ds.disk.write import write_json
from qwen_ds.errors import UserError
from qwen_ds.model.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    check_adapter_fits,
    read_adapter,
)
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.family import QWEN
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train.special_rows import EmbeddingWithRows, HeadWithRows

ADAPTER = "default"  # peft's name for the only adapter of a model


class CastLinear(nn.Linear):
    """A bias-free linear map whose fp32 weight is used in the input's dtype.

    A module of its own, so that ZeRO-3 gathers its weight.
    """

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
    """Dropout for CPUs: x with zeros, and the share that is kept, by which the caller divides.

    A CPU draws random numbers one after another. Here one draw of 64 bits decides on four elements,
    so p is rounded to a multiple of 2^-16: 2048 x 512 elements took 3 ms so, and 16 ms with torch's
    dropout.
    """
    dropped = round(p * 2**16)
    draws = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), dtype=torch.int64)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return torch.where(keep, x, 0.0), 1 - dropped / 2**16


class LoraLinear(peft_lora.Linear):
    """peft's LoRA linear with the branch in the activations' dtype: [..., in] -> [..., out]."""

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
        plain = not (self.disable_adapters or self.merged or self.lora_variant)
        if not plain or self.active_adapters != [ADAPTER]:
            return super().forward(x, *args, **kwargs)
        scale, dropout = self.scaling[ADAPTER], self.lora_dropout[ADAPTER]
        dropped = x
        if isinstance(dropout, nn.Dropout) and dropout.training:
            if x.device.type == "cpu":
                dropped, share_kept = drop(x, dropout.p)
                scale /= share_kept
            else:
                dropped = dropout(x)
        # The scale multiplies the r-wide middle and not the wide result: one pass less over memory.
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
    unknown = [name for name in options.targets if name not in QWEN.target_names]
    if unknown or not options.targets:
        came = unknown[0] if unknown else "nothing"
        known = ", ".join(QWEN.target_names)
        raise UserError(f"lora.targets: {came!r} matches no module; expected some of {known}")
    if other := next((name for name in options.modules_to_save if name not in QWEN.ends), None):
        known = ", ".join(QWEN.ends)
        raise UserError(f"lora.modules_to_save: {other!r} came; expected some of {known}")
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
    """Wrap `model` with a fresh adapter, fp32 and trainable; A is random and B zero.

    `model` may be partitioned by ZeRO-3. The parameters that start from the base's weights come
    from gathered ones: DoRA's magnitudes, `options.modules_to_save` and the token rows.

    Args:
        seed: of A, alike on every rank.
        row_ids: token ids whose rows of embedding and head are trained.

    Raises:
        UserError: unknown names in lora.targets or lora.modules_to_save.
    """
    config = lora_config(options, base)
    config._register_custom_module({nn.Linear: LoraLinear})
    torch.manual_seed(seed)
    wrapped = PeftModel(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    config._custom_modules = None  # not part of the file format
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # peft's own wrappers keep a frozen copy of a saved module, and copy the whole matrix for some
    # rows of it at every forward pass. These replacements use the same names and configuration.
    embedding, head = model.get_submodule(QWEN.embedding), model.get_submodule(QWEN.head)
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    embedding_name, head_name = QWEN.ends
    if row_ids:
        with gather_params_ctx(embedding.parameters(), modifier_rank=None):
            model.set_submodule(QWEN.embedding, EmbeddingWithRows(embedding, row_ids))
        with gather_params_ctx(head.parameters(), modifier_rank=None):
            model.set_submodule(QWEN.head, HeadWithRows(head, row_ids))
        config_of(wrapped).trainable_token_indices = {name: list(row_ids) for name in QWEN.ends}
    if embedding_name in options.modules_to_save:
        copy = _fp32_copy(embedding.weight)
        model.set_submodule(QWEN.embedding, CastEmbedding(copy, embedding.weight.dtype))
    if head_name in options.modules_to_save:
        cast = CastLinear(head.in_features, head.out_features, bias=False, device="meta")
        cast.weight = _fp32_copy(head.weight)
        model.set_submodule(QWEN.head, cast)
    config_of(wrapped).modules_to_save = list(options.modules_to_save) or None
    return wrapped


def _fp32_copy(weight: Tensor) -> nn.Parameter:
    assert isinstance(weight, nn.Parameter)
    with gather_params_ctx([weight], modifier_rank=None):
        return nn.Parameter(weight.detach().to(torch.float32, copy=True))


def borrowed_weights(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Modules that read a child's weight directly: DoRA needs the norms of the base's rows."""
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


def check_init_from(options: LoraOptions, config: QWenConfig, row_ids: Sequence[int] = ()) -> None:
    """Check that training can continue from `options.init_from`, without a base's weights.

    Args:
        config: of the base.
        row_ids: as for `add_lora`.

    Raises:
        UserError: as `init_from`.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = QWenLMHeadModel(config)
        wrapped = add_lora(model, options, base="", seed=0, row_ids=row_ids)
    _read_fitting(wrapped, options)


def init_from(wrapped: PeftModel, options: LoraOptions) -> None:
    """Continue from the adapter `options.init_from`: its values replace the fresh ones.

    Accepted are ours, the official finetune.py's and LLaMA-Factory's (stock PEFT folders), and the
    original project's `pytorch_model.bin`. Saved modules and token rows that the adapter lacks
    start from the base's.

    Raises:
        UserError: the adapter has other modules or rows, another rank or another scale than the
            recipe says; the first is named.
    """
    own = _trained(wrapped)
    adapter = _read_fitting(wrapped, options)
    theirs = adapter.state_dict()
    for rows in adapter.token_rows.values():
        wanted = _trained_rows(wrapped)
        theirs[rows.key] = theirs[rows.key][[rows.indices.index(i) for i in wanted]]
    for name, tensor in theirs.items():
        own[name].data.copy_(tensor)


def _trained(wrapped: PeftModel) -> dict[str, nn.Parameter]:
    """The trainable parameters by their names in an adapter file."""
    return {plain_name(name): p for name, p in wrapped.named_parameters() if p.requires_grad}


def _trained_rows(wrapped: PeftModel) -> list[int]:
    """The token ids whose rows are trained, the same for embedding and head."""
    trained = config_of(wrapped).trainable_token_indices
    return trained[QWEN.ends[0]] if isinstance(trained, dict) else []


def _read_fitting(wrapped: PeftModel, options: LoraOptions) -> Adapter:
    """Read options.init_from and compare it with the adapter that the recipe trains."""
    folder, own = options.init_from, _trained(wrapped)
    assert folder is not None
    adapter = read_adapter(folder, allow_pickle=True, alpha=options.alpha)
    base = wrapped.get_base_model().named_parameters()
    shapes = {name.replace(".base_layer.", "."): _full_shape(p) for name, p in base}
    check_adapter_fits(adapter, shapes)
    for name in sorted(set(own) ^ set(adapter.shapes)):
        of_lora = ".lora_" in name
        if name in own and not of_lora:
            continue
        side = "the recipe does not train it"
        if name in own:
            side = "the recipe trains it and the adapter lacks it"
        keys = "lora.modules_to_save and lora.special_rows"
        if of_lora:
            keys = "lora.targets and lora.variant"
        raise UserError(
            f"lora.init_from {folder}: {name}: {side}; make {keys} match, or merge it into the "
            f"base (launch/merge.py) and start from the merged model"
        )
    scaling = options.alpha / (math.sqrt(options.r) if options.variant == "rslora" else options.r)
    for module, pair in adapter.pairs.items():
        if not math.isclose(pair.scaling, scaling):
            raise UserError(
                f"lora.init_from {folder}: {module} is scaled by {pair.scaling:g}; the recipe's "
                f"lora.alpha and lora.r say {scaling:g}; expected the same"
            )
    for module, rows in adapter.token_rows.items():
        wanted = sorted(_trained_rows(wrapped))
        if wanted != sorted(rows.indices):
            raise UserError(
                f"lora.init_from {folder}: it trains the rows {sorted(rows.indices)} of {module}; "
                f"expected {wanted} (lora.special_rows)"
            )
    for name, shape in adapter.shapes.items():
        if shape != tuple(own[name].shape):
            raise UserError(
                f"lora.init_from {folder}: {name} is {list(shape)}; expected "
                f"{list(own[name].shape)} (lora.r)"
            )
    return adapter


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also while ZeRO-3 holds it in pieces."""
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def plain_name(name: str) -> str:
    """A parameter's name in the adapter file: without the adapter's own name."""
    if "lora_magnitude_vector" in name:
        return name.removesuffix(f".{ADAPTER}.weight")
    return name.replace(f".{ADAPTER}.weight", ".weight")


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count trainable and total parameters; also meta tensors and ZeRO-3's partitioned ones."""
    parameters = list(model.parameters())
    trainable = sum(numel(p) for p in parameters if p.requires_grad)
    return ParameterCount(trainable, sum(map(numel, parameters)))


def numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also while ZeRO-3 holds it in pieces."""
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else parameter.numel()


def write_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Write a stock PEFT folder: adapter_config.json and adapter_model.safetensors.

    Args:
        folder: made if it is missing; of an output that is not published yet.
        tensors: complete fp32 values by the wrapped model's parameter names.

    Returns:
        file name -> sha256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        assert tensor.numel() > 0, f"{name} is empty: it was saved while ZeRO-3 held it partitioned"
    settings = config.to_dict() | {"inference_mode": True}
    # A set's order differs from run to run.
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    weights = {plain_name(name): tensor for name, tensor in tensors.items()}
    return {
        WEIGHTS_NAME: save_tensors(folder / WEIGHTS_NAME, weights),
        CONFIG_NAME: write_json(folder / CONFIG_NAME, settings),
    }
