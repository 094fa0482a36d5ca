"""A run's decisions made real: data prepared, model and adapter loaded."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.callback import on_compile_end, on_compile_start
from torch._functorch import config as functorch_config
from torch.fx.experimental import _config as shapes_config
from transformers.utils import logging as transformers_logging

from qwen_ds import dist
from qwen_ds.data.batches import StepSampler
from qwen_ds.data.rows.token_rows import Prepared, TokenRows, prepare
from qwen_ds.errors import UserError
from qwen_ds.model.family import Family, LanguageModel
from qwen_ds.model.liger import liger_pieces
from qwen_ds.model.loading import load_base
from qwen_ds.model.pieces import compiled_pieces, fill
from qwen_ds.plan.recomputation import from_recipe
from qwen_ds.plan.run import Run
from qwen_ds.train import lora
from qwen_ds.train.engine.loading import partitioned_loading
from qwen_ds.train.loss import TrainingModel, compiled_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Data:
    """Token rows, and the sampler that deals this rank its micro-batches."""

    train: TokenRows
    eval: TokenRows | None
    sampler: StepSampler
    findings: list[dict[str, Any]]
    """Of the doctor's short check, on rank 0."""

    @property
    def sha256(self) -> str:
        """Of the token rows, for training and for evaluation."""
        return self.train.sha256 + ("" if self.eval is None else f" {self.eval.sha256}")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens of the longest row, rows, and most padded tokens of a micro-batch."""
        return int(self.train.lens.max()), len(self.train), self.sampler.budget

    def report(self) -> dict[str, Any]:
        """The content of data_report.json."""
        of_eval = None if self.eval is None else self.eval.report
        return {**self.train.report, "eval": of_eval, "findings": self.findings}


@dataclass(frozen=True, slots=True)
class Model:
    """The model that DeepSpeed gets, the adapter's configuration, and the parameter count."""

    training: TrainingModel
    adapter_config: lora.LoraConfig | None  # None: full training
    count: lora.ParameterCount


def load_data(run: Run) -> Data:
    """Tokenised rows (made once per machine, memory-mapped) and the sampler of this rank.

    A collective: the ranks compare their rows. Raises UserError for data that cannot be trained on,
    or other rows on another machine.
    """
    recipe, batch = run.recipe, run.recipe.batch

    def prepared(every_byte: bool) -> Prepared:
        length = run.base.config.seq_length
        return prepare(recipe.data, run.encoding, length, recipe.seed, every_byte)

    # The first rank of each machine tokenises, or compares the checksum of what it wrote once; then
    # the others open that.
    found: list[Prepared] = []
    dist.once_per_machine(lambda: found.append(prepared(True)), "data")
    rows = found[0] if found else prepared(False)
    sampler = StepSampler(
        rows.train, batch.rows_per_step, recipe.seed,
        dist.world_size(), dist.rank(), batch.tokens_per_micro_batch,
        levels=run.levels_micro_batches,
    )  # fmt: skip
    findings = []
    if dist.rank() == 0:
        # Its libraries are for text, and the ranks beside need none of them.
        from qwen_ds.data.doctor.brief import brief

        findings = brief(recipe.data)
    data = Data(rows.train, rows.eval, sampler, findings)
    # All ranks, once: machines may have files of their own.
    seen = dist.gather(data.sha256)
    if other := next((rank for rank, sha256 in enumerate(seen) if sha256 != seen[0]), None):
        raise UserError(
            f"rank {other} reads other rows than rank 0; expected the same data files on every "
            "machine"
        )
    return data


def load_model(run: Run, device: torch.device) -> Model:
    """The base in its dtype, partitioned on arrival under ZeRO-3, and what is trained of it."""
    recipe, options, family = run.recipe, run.recipe.model, run.base.family
    transformers_logging.disable_progress_bar()  # the ranks' bars would overwrite each other
    # The adapter is made inside, too: DoRA's first magnitudes come from the base's weights, which
    # peft gathers only there.
    with partitioned_loading(run.deepspeed, run.dtype):
        model = load_base(run.model, run.dtype, options.attention)
        if run.deepspeed.stage < 3:
            model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides torch's
        draws = recipe.method == "lora" and recipe.lora.dropout > 0
        recompute_blocks(model, from_recipe(options.activation_checkpointing), draws=draws)
        if run.liger is not None:
            fill(model, liger_pieces())
        elif options.compile == "pieces":
            begin_compiling("pieces of the blocks and the loss")
            fill(model, compiled_pieces())
        elif options.compile:
            compile_blocks(model, family, device)
        trained: nn.Module = model
        if recipe.method == "lora":
            trained = wrapped = lora.add_lora(
                model, recipe.lora, base=options.path, seed=recipe.seed, row_ids=run.special_ids
            )
    config = None
    if recipe.method == "lora":
        config = lora.config_of(wrapped)
        if recipe.lora.init_from:
            lora.init_from(wrapped, recipe.lora)
    training = TrainingModel(trained, model.base_model, model.get_output_embeddings())
    if options.compile:
        training.loss_head.loss_of = compiled_loss()
    return Model(training, config, lora.count_parameters(trained))


def recompute_blocks(model: LanguageModel, every: int, *, draws: bool = True) -> None:
    """Switch activation checkpointing on in every every-th block; 1: in all, 0: in none.

    `draws`: whether the adapter draws random numbers, or the base where its configuration says so.
    Else the generators' states are not kept for the second forward pass, which on a GPU copies
    them to and fro at each block.
    """
    if every:
        dropouts = (p for key, p in model.config.to_dict().items() if "dropout" in key)
        draws = draws or any(isinstance(p, int | float) and p > 0 for p in dropouts)
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": draws}
        )
        model.transformer.checkpoint_every = every


def compile_blocks(model: LanguageModel, family: Family, device: torch.device) -> None:
    """Compile the forward pass of each block by itself, for any row count and length.

    All blocks share the code, so depth costs nothing. What surrounds it stays as it is: the hooks
    by which ZeRO-3 gathers a block's weights.
    """
    options: dict[str, Any] | None = None
    if device.type == "cpu":
        # Dropout draws as it does without compilation, for as many tokens; on a GPU the numbers
        # are made in the kernel.
        options = {"fallback_random": True}
        # The backward pass computes again what costs least, to save a tenth less.
        functorch_config.activation_memory_budget = 0.9
    begin_compiling("the blocks and the loss")
    for block in model.get_submodule(family.blocks).children():
        block.forward = torch.compile(block.forward, dynamic=True, options=options)


def begin_compiling(what: str) -> None:
    """Let the compiler take no two sizes for one, which are equal now and differ in the next
    micro-batch; and let the log say, after each compilation, how long they have taken."""
    shapes_config.use_duck_shape = False
    began = total = 0.0

    def start(_: object) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(_: object) -> None:
        nonlocal total
        total += time.perf_counter() - began
        log.info("compilation of %s has taken %.1f s so far", what, total)

    on_compile_start(start)
    on_compile_end(end)
