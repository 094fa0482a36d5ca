"""From a recipe to something that can be trained: data, model, adapter and engine, each checked before the next."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch._dynamo.callback import on_compile_end, on_compile_start
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import qwen_ds  # noqa: F401  registers the native classes
from qwen_ds import demo, dist
from qwen_ds.data.batches import StepSampler
from qwen_ds.data.rows.token_rows import TokenRows, prepare
from qwen_ds.errors import UserError
from qwen_ds.machine import available_memory, has_fast_bf16
from qwen_ds.model.folder import find_model
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.plan import candidates as plan
from qwen_ds.plan import deepspeed_json as ds_config
from qwen_ds.plan.activations import Saving
from qwen_ds.plan.memory import peak_memory
from qwen_ds.plan.shape import Shape
from qwen_ds.plan.traffic import Zero
from qwen_ds.recipe.loading import LoadedRecipe
from qwen_ds.recipe.options import Recipe
from qwen_ds.train import lora, special_rows
from qwen_ds.train.engine.loading import partitioned_loading
from qwen_ds.train.loss import TrainingModel

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CPU_PARAMETERS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Data:
    train: TokenRows
    eval: TokenRows | None
    sampler: StepSampler

    @property
    def sha256(self) -> str:
        """Of the token rows, for training and for evaluation."""
        return self.train.sha256 + ("" if self.eval is None else f" {self.eval.sha256}")


@dataclass(frozen=True, slots=True)
class Model:
    """What DeepSpeed gets, the adapter's configuration (None: full training), and the parameter count."""

    training: TrainingModel
    adapter_config: lora.LoraConfig | None
    count: lora.ParameterCount


def find_sources(loaded: LoadedRecipe) -> LoadedRecipe:
    """Put real paths into the recipe: the demo's files are made, a hub id becomes the folder it was fetched into."""
    recipe = loaded.recipe
    if recipe.data.train and "model.path" not in loaded.set_keys:
        raise UserError(
            "model.path is not set; expected the folder or hub id of a Qwen model beside data.train"
        )
    if recipe.model.path == "demo":
        home = Path.home() / ".cache" / "qwen_ds" / "demo"
        dist.once_per_machine(lambda: demo.prepare(home), "demo")
        paths = demo.prepare(home)
        data = recipe.data
        if not data.train:
            data = replace(data, train=[str(paths.train)], eval=data.eval or [str(paths.eval)])
        recipe = replace(recipe, model=replace(recipe.model, path=str(paths.model)), data=data)
    if not recipe.data.train:
        raise UserError("data.train is empty; expected one or more files, folders or hub data sets")
    dist.once_per_machine(lambda: find_model(recipe.model.path), "model")
    path = str(find_model(recipe.model.path).resolve())
    return replace(loaded, recipe=replace(recipe, model=replace(recipe.model, path=path)))


def check_device(recipe: Recipe, device: torch.device) -> None:
    """A real model on a CPU must be what the user wants: a step of the 7B takes minutes there."""
    if device.type == "cpu" and recipe.device == "auto":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(recipe.model.path))
        total = sum(p.numel() for p in model.parameters())
        if total > CPU_PARAMETERS:
            raise UserError(
                f"{recipe.model.path} has {total / 1e9:.1f} billion parameters and this machine no GPU; expected a "
                f"GPU, or --device cpu if minutes per step are meant"
            )


def load_data(recipe: Recipe) -> Data:
    """Tokenised rows (made once per machine, memory-mapped) and the sampler of this rank."""

    def make() -> None:
        prepare(recipe.data, Path(recipe.model.path), seed=recipe.seed)

    dist.once_per_machine(make, "data")
    rows = prepare(recipe.data, Path(recipe.model.path), seed=recipe.seed)
    sampler = StepSampler(
        rows.train, recipe.batch.rows_per_step, recipe.seed, dist.world_size(), dist.rank(),
        recipe.batch.tokens_per_micro_batch,
    )  # fmt: skip
    data = Data(rows.train, rows.eval, sampler)
    seen = dist.gather(data.sha256)
    if other := next((rank for rank, text in enumerate(seen) if text != seen[0]), None):
        raise UserError(
            f"rank {other} reads other rows than rank 0; expected the same data files on every machine"
        )
    return data


def load_model(recipe: Recipe, resolved: ds_config.ResolvedConfig, device: torch.device) -> Model:
    """The base in its dtype (partitioned on arrival under ZeRO-3), and what is trained of it."""
    dtype, attention = DTYPES[recipe.model.dtype], choose_attention(recipe, device).model.attention
    transformers_logging.disable_progress_bar()  # one bar per rank, over each other
    # The adapter is made inside, too: DoRA's fresh magnitudes come from the base's weights, gathered only there.
    with partitioned_loading(resolved, dtype):
        model = AutoModelForCausalLM.from_pretrained(
            recipe.model.path, dtype=dtype, attn_implementation=attention
        )
        assert isinstance(model, QWenLMHeadModel)
        if resolved.stage < 3:
            model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides torch's signature
        recompute_blocks(model, recipe.model.activation_checkpointing)
        if recipe.model.compile:
            compile_blocks(model, device)
        if recipe.method == "full":
            return Model(
                TrainingModel(model, model.transformer, model.lm_head),
                None,
                lora.count_parameters(model),
            )
        rows = (
            special_rows.special_ids(Path(recipe.model.path))
            if recipe.lora.special_rows == "on"
            else []
        )
        wrapped = lora.add_lora(
            model, recipe.lora, base=recipe.model.path, seed=recipe.seed, row_ids=rows
        )
    if recipe.lora.init_from:
        lora.init_from(wrapped, recipe.lora)
    training = TrainingModel(wrapped, model.transformer, model.lm_head)
    return Model(training, lora.config_of(wrapped), lora.count_parameters(wrapped))


def choose_dtype(loaded: LoadedRecipe, device: torch.device) -> LoadedRecipe:
    """The recipe with `auto` dtype replaced by the faster one of those that hold a bf16 base exactly, on all ranks the
    same (on a CPU a collective). A DeepSpeed JSON may still ask for another.

    Only LoRA may have it in fp32: in full training the dtype is that of the result.
    """
    recipe = loaded.recipe
    if recipe.model.dtype != "auto":
        return loaded
    slow = (
        recipe.method == "lora" and device.type == "cpu" and not all(dist.gather(has_fast_bf16()))
    )
    model = replace(recipe.model, dtype="float32" if slow else "bfloat16")
    return LoadedRecipe(replace(recipe, model=model), loaded.set_keys - {"model.dtype"})


def choose_attention(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with `auto` attention replaced by the faster kernel.

    On CPUs plain bf16 products beat SDPA, whose backward is slow in bf16; in fp32 it is the faster one.
    """
    if recipe.model.attention != "auto":
        return recipe
    on_cpu_in_bf16 = device.type == "cpu" and recipe.model.dtype == "bfloat16"
    kernel: Literal["sdpa", "eager"] = "eager" if on_cpu_in_bf16 else "sdpa"
    return replace(recipe, model=replace(recipe.model, attention=kernel))


def compile_blocks(model: QWenLMHeadModel, device: torch.device) -> None:
    """Compile each block by itself, for any row count and length: all blocks share the code, so depth costs nothing."""
    # On a CPU dropout draws the numbers that it draws without compilation; on a GPU they are made in the kernel.
    options = {"fallback_random": True} if device.type == "cpu" else None
    for block in model.transformer.h:
        block.compile(dynamic=True, options=options)
    began = total = 0.0

    def start(_: object) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(_: object) -> None:
        nonlocal total
        total += time.perf_counter() - began
        log.info("compilation of the blocks has taken %.1f s so far", total)

    on_compile_start(start)
    on_compile_end(end)


def choose_recomputation(
    recipe: Recipe, resolved: ds_config.ResolvedConfig, data: Data, device: torch.device
) -> tuple[Recipe, str]:
    """The recipe with `auto` activation checkpointing replaced by the least that fits, and why, in words ("" where the
    recipe says it itself). To be called before the model takes its memory; a collective.

    The largest micro-batch that any step may have must fit with a share plan.MARGIN to spare. The ranks agree on the
    least memory among them: under ZeRO-3 they gather in step, so what they recompute must be alike.
    """
    if recipe.model.activation_checkpointing != "auto":
        return recipe, ""
    on_gpu = device.type == "cuda"
    if recipe.model.memory_gb is not None:
        given, of = recipe.model.memory_gb * 1e9, "that model.memory_gb allows"
    elif on_gpu:
        given, of = float(torch.cuda.mem_get_info(device)[0]), "that are free on the GPU"
    else:
        given, of = available_memory() / dist.local_world_size(), "of free memory for each rank"
    given = min(dist.gather(given))
    shape = Shape.of(AutoConfig.from_pretrained(recipe.model.path))
    how, zero = Saving.of(recipe, on_gpu=on_gpu), Zero.of(resolved.engine_json, dist.world_size())
    batch = plan.largest_micro_batch(data.train.lens, recipe.batch, dist.world_size())

    def peak(every: int) -> float:
        return peak_memory(shape, how, zero, batch, every).total

    every = plan.least_recomputation(
        shape.layers, lambda every: peak(every) <= (1 - plan.MARGIN) * given
    )
    choice = plan.in_recipe(1 if every is None else every)
    if recipe.lora.variant == "dora" and recipe.method == "lora":
        choice, why = "all", "what DoRA keeps is not predicted"
    else:
        why = f"predicted peak {peak(1 if every is None else every) / 1e9:.3g} of the {given / 1e9:.3g} GB {of}"
        why += "" if every is not None else ", more than there is"
    model = replace(recipe.model, activation_checkpointing=choice)
    return replace(recipe, model=model), f"activation checkpointing auto is {choice}: {why}"


def recompute_blocks(model: QWenLMHeadModel, choice: str | int) -> None:
    """Switch activation checkpointing on in no block, in all, or in every n-th; `auto` is chosen before."""
    every = {"none": 0, "all": 1}[choice] if isinstance(choice, str) else choice
    if every < 0:
        raise UserError(
            f"model.activation_checkpointing is {every}; expected auto, none, all or a positive number of blocks"
        )
    if every:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
        model.transformer.checkpoint_every = every
