"""LoRA for training: peft makes and names the adapter, and the branch is computed here.

peft casts the activations up to the adapter's fp32, which is slow and keeps fp32 copies for the
backward pass. Here the two small matrices are cast down to the activations' dtype instead: the
branch runs at the base's speed, while the parameters, their gradients and AdamW's state stay fp32
(test_the_branch_computes_in_the_activations_dtype). DoRA's branch is peft's own, in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from qwen_ds.model.adapter import CONFIG_NAME, WEIGHTS_NAME
from qwen_ds.model.family import LanguageModel, family_of
from qwen_ds.model.modeling import QWenMLP
from qwen_ds.plan.first_adapter import read_first_adapter
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train.lora_product import Cast, LoraMap, lora_formula, lora_products
from qwen_ds.train.special_rows import EmbeddingWithRows, HeadWithRows

ADAPTER = "default"  # peft's name for the only adapter of a model


class CastLinear(nn.Linear):
    """A bias-free linear map whose fp32 weight is used in the input's dtype.

    A module of its own, so that ZeRO-3 gathers its weight.
    """

    def __init__(self, like: nn.Linear, weight: Tensor) -> None:
        # On meta, here and below: the weight is replaced at once, so none is allocated.
        super().__init__(like.in_features, like.out_features, bias=False, device="meta")
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class CastEmbedding(nn.Embedding):
    """An embedding whose fp32 weight gives activations of the base's dtype."""

    def __init__(self, base: nn.Embedding, weight_VD: nn.Parameter) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = weight_VD
        self.activations_dtype = base.weight.dtype

    def forward(self, ids_BT: Tensor) -> Tensor:
        return super().forward(ids_BT).to(self.activations_dtype)


class LoraLinear(peft_lora.Linear):
    """peft's LoRA linear with the branch in the activations' dtype: [..., in] -> [..., out].

    Base, A and B are used here and not by modules of their own: one function computes it all
    (qwen_ds/train/lora_product.py). Under ZeRO-3 their weights are gathered with the whole block.
    """

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        for matrices in (self.lora_A, self.lora_B):
            made = matrices[adapter_name]
            assert isinstance(made, nn.Linear)
            matrices[adapter_name] = CastLinear(made, made.weight)
        self.cast_of_a, self.cast_of_b = Cast(), Cast()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.is_fused:
            return super().forward(x, *args, **kwargs)
        (y,) = _results([self], x)
        return y

    @property
    def map(self) -> LoraMap:
        """Base, A and B."""
        base, a, b = self.get_base_layer(), self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        assert isinstance(base, nn.Linear)
        assert isinstance(a, CastLinear)
        assert isinstance(b, CastLinear)
        return LoraMap(base, a.weight, b.weight)

    @property
    def is_fused(self) -> bool:
        """Whether the one function computes it; else peft does, with modules of their own."""
        special = self.disable_adapters or self.merged or self.lora_variant
        return not special and self.active_adapters == [ADAPTER]


def side_by_side(first: nn.Module, second: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps of one x, both with LoRA: their branches share a dropout mask and a product."""
    fused = [m for m in (first, second) if isinstance(m, LoraLinear) and m.is_fused]
    if len(fused) < 2:
        return first(x), second(x)
    y_first, y_second = _results(fused, x)
    return y_first, y_second


def _results(linears: Sequence[LoraLinear], x: Tensor) -> Sequence[Tensor]:
    """y of each map of one x. They are of one recipe: rank, scale and dropout are alike."""
    first, maps = linears[0], [linear.map for linear in linears]
    dropout, scale = first.lora_dropout[ADAPTER], first.scaling[ADAPTER]
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if torch.compiler.is_compiling():
        return lora_formula(x, maps, scale, p)
    casts_of_b = [
        linear.cast_of_b.of([each.b_OR], x.dtype)
        for linear, each in zip(linears, maps, strict=True)
    ]
    cast_of_a = first.cast_of_a.of([each.a_RI for each in maps], x.dtype)
    return lora_products(x, maps, (cast_of_a, casts_of_b), scale, p)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} trainable of {self.total:,} parameters ({share:.3f} %)"


def add_lora(
    model: LanguageModel, options: LoraOptions, *, base: str, seed: int, row_ids: Sequence[int] = ()
) -> PeftModel:
    """Wrap `model` with a fresh adapter, fp32 and trainable; A is random and B zero.

    ZeRO-3 may have partitioned `model`. Parameters that start from the base's weights (DoRA's
    magnitudes, `options.modules_to_save`, the token rows) are made while those are gathered.

    Args:
        seed: of A, alike on every rank.
        row_ids: token ids whose rows of embedding and head are trained.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=sorted(options.targets),
        use_rslora=options.variant == "rslora",
        use_dora=options.variant == "dora",
    )
    config._register_custom_module({nn.Linear: LoraLinear})
    torch.manual_seed(seed)
    wrapped = PeftModel(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    config._custom_modules = None  # not part of the file format
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, QWenMLP):
            module.both = side_by_side
    # peft's own wrappers keep a frozen copy of a saved module, and copy the whole matrix for some
    # rows of it at every forward pass. These replacements use the same names and configuration.
    family = family_of(model.config)
    embedding, head = model.get_submodule(family.embedding), model.get_submodule(family.head)
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    embedding_name, head_name = family.ends
    if row_ids:
        with gather_params_ctx(embedding.parameters(), modifier_rank=None):
            model.set_submodule(family.embedding, EmbeddingWithRows(embedding, row_ids))
        with gather_params_ctx(head.parameters(), modifier_rank=None):
            model.set_submodule(family.head, HeadWithRows(head, row_ids))
        config_of(wrapped).trainable_token_indices = {name: list(row_ids) for name in family.ends}
    if embedding_name in options.modules_to_save:
        cast = CastEmbedding(embedding, _fp32_copy(embedding.weight))
        model.set_submodule(family.embedding, cast)
    if head_name in options.modules_to_save:
        model.set_submodule(family.head, CastLinear(head, _fp32_copy(head.weight)))
    config_of(wrapped).modules_to_save = list(options.modules_to_save) or None
    return wrapped


def _fp32_copy(weight: Tensor) -> nn.Parameter:
    assert isinstance(weight, nn.Parameter)
    with gather_params_ctx([weight], modifier_rank=None):
        return nn.Parameter(weight.detach().to(torch.float32, copy=True))


def config_of(wrapped: PeftModel) -> LoraConfig:
    """The configuration that goes into adapter_config.json."""
    config = wrapped.peft_config[ADAPTER]
    assert isinstance(config, LoraConfig)
    return config


def init_from(wrapped: PeftModel, options: LoraOptions) -> None:
    """Continue from the adapter `options.init_from`: its values replace the fresh ones.

    It fits: plan/first_adapter.py has compared it with the recipe. Saved modules and token rows
    that it lacks start from the base's.
    """
    own = {plain_name(name): p for name, p in wrapped.named_parameters() if p.requires_grad}
    adapter = read_first_adapter(options)
    theirs = adapter.state_dict()
    wanted = config_of(wrapped).trainable_token_indices
    for rows in adapter.token_rows.values():  # theirs may be in another order
        assert isinstance(wanted, dict)
        order = [rows.indices.index(i) for i in next(iter(wanted.values()))]
        theirs[rows.key] = theirs[rows.key][order]
    for name, tensor in theirs.items():
        own[name].data.copy_(tensor)


def plain_name(name: str) -> str:
    """A parameter's name in the adapter file: without the adapter's own name."""
    if "lora_magnitude_vector" in name:
        return name.removesuffix(f".{ADAPTER}.weight")
    return name.replace(f".{ADAPTER}.weight", ".weight")


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count trainable and total parameters, including those that ZeRO-3 holds in pieces."""
    parameters = list(model.parameters())
    trainable = sum(numel(p) for p in parameters if p.requires_grad)
    return ParameterCount(trainable, sum(map(numel, parameters)))


def numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter, even while ZeRO-3 holds it in pieces."""
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else parameter.numel()


def write_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Write a stock PEFT folder, of an output that is not published yet; file name -> sha256.

    `tensors`: complete fp32 values by the wrapped model's parameter names.
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
