"""What launch/plan.py prints: the table of candidates, and the command of the best."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from qwen_ds.errors import UserError
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.folder import find_model
from qwen_ds.plan import candidates as plan
from qwen_ds.plan import deepspeed_json as ds_config
from qwen_ds.plan import flops
from qwen_ds.plan.activations import Saving
from qwen_ds.plan.candidates import Candidate, Workload
from qwen_ds.plan.gpus import GPUS, Gpu, gpu_named
from qwen_ds.plan.memory import official_memory, trained_parameters
from qwen_ds.plan.shape import Shape
from qwen_ds.plan.traffic import Links, Zero
from qwen_ds.recipe.loading import LoadedRecipe
from qwen_ds.train import setup

COLUMNS = "ZeRO  micro-batch  recomputed   weights  trained  gradients  activations   head  buffers  context"


@dataclass(frozen=True)
class PlanOptions:
    """The machine, and what the rows are like."""

    gpus: int = 8
    """GPUs in all."""
    gpu_memory: float | None = None
    """Memory of each in GB (10^9 bytes); unset: what the GPU is sold with."""
    gpu: str = "h100"
    """Which GPU: a100, a800, h100, h800, h20, h200, l40s, rtx4090 ..."""
    gpus_per_machine: int = 8
    """GPUs of one machine; between machines 400 Gb/s for each GPU are assumed."""
    row_tokens: int = 157
    """Median tokens of a row, prompt and answer (AdvertiseGen: 157)."""
    learnt_share: float = 0.66
    """Share of the tokens that is learnt (AdvertiseGen: 0.66)."""
    longest_row: int | None = None
    """Tokens of the longest row; unset: data.max_tokens, else data.max_prompt_tokens + data.max_answer_tokens."""
    every_choice: bool = False
    """Show each choice of recomputation, not only the least that fits."""


def plan_text(loaded: LoadedRecipe, options: PlanOptions, words: Sequence[str]) -> str:
    """The whole answer; `words` are the recipe's options as the user gave them.

    Raises:
        UserError: an unknown GPU, a number that cannot be meant, or what the recipe and its JSON are refused for.
    """
    gpu = _checked(options)
    loaded = setup.choose_dtype(loaded, torch.device("cuda"))
    zeros = _stages(loaded, options)
    recipe, shape = loaded.recipe, _shape(loaded)
    if recipe.lora.variant == "dora" and recipe.method == "lora":
        raise UserError(
            "lora.variant is dora, whose memory is not predicted; expected lora or rslora"
        )
    data = recipe.data
    longest = (
        options.longest_row or data.max_tokens or data.max_prompt_tokens + data.max_answer_tokens
    )
    workload = Workload.like(
        recipe.batch.rows_per_step, options.row_tokens, options.learnt_share, longest
    )
    how, memory = Saving.of(recipe, on_gpu=True), (options.gpu_memory or gpu.memory_gb) * 1e9
    links = Links(options.gpus_per_machine, gpu.link)
    every = (0, 2, 1) if options.every_choice else None
    found = plan.candidates(shape, how, zeros, gpu, links, workload, memory, every=every)
    tokens = float(workload.lens.sum())
    needed = flops.step_flops(
        shape,
        method=recipe.method,
        tokens=tokens,
        targets=tokens * options.learnt_share,
        squared_tokens=float((workload.lens**2.0).sum()),
    )
    lines = [
        f"{shape.parameters / 1e9:.2f} billion parameters, {trained_parameters(shape, how) / 1e6:,.1f} million trained "
        f"({recipe.method}); {options.gpus} x {gpu.key} with {memory / 1e9:g} GB, of which {plan.MARGIN:.0%} stay free",
        f"{recipe.batch.rows_per_step} rows a step, {int(workload.lens.mean())} tokens each and {longest} at most",
        "",
        f"{COLUMNS}  = GB    s/step  tokens/s/GPU   MFU",
    ]
    winner = plan.best(found)
    for candidate in found:
        seconds = candidate.seconds.total
        rate = tokens / seconds / options.gpus
        share = flops.utilisation(needed, seconds, options.gpus, gpu)
        end = "  best" if candidate is winner else "" if candidate.fits else "  does not fit"
        lines.append(f"{_row(candidate)}  {seconds:6.2f}  {rate:12,.0f}  {share:4.0%}{end}")
    lines += ["", *_closing(loaded, options, words, winner, shape, longest)]
    return "\n".join(lines)


def _row(candidate: Candidate) -> str:
    part = candidate.memory
    recomputed = (
        str(plan.in_recipe(candidate.every)) if candidate.every < 2 else f"1 in {candidate.every}"
    )
    values = (
        f"{value / 1e9:{width}.2f}"
        for value, width in (
            (part.weights, 9), (part.adapter_and_optimizer, 8), (part.gradients, 10), (part.activations, 12),
            (part.loss_head, 6), (part.zero_buffers, 8), (part.context, 8), (part.total, 6),
        )
    )  # fmt: skip
    return f"{candidate.zero.stage:>4}  {candidate.budget:>11}  {recomputed:<11}" + " ".join(values)


def _closing(
    loaded: LoadedRecipe,
    options: PlanOptions,
    words: Sequence[str],
    winner: Candidate | None,
    shape: Shape,
    longest: int,
) -> list[str]:
    lines = []
    if any(zero.offload_optimizer or zero.offload_parameters for zero in _stages(loaded, options)):
        lines.append("Times leave out what offloading copies to and from the host's memory.")
    if loaded.recipe.method == "lora":
        official = official_memory(shape, longest, embedding=False)
        lines.append(
            f"The official finetune.py (r 64, one row of {longest} tokens) would hold {official / 1e9:.1f} GB."
        )
    if winner is None:
        return [
            *lines,
            "Nothing fits: more GPUs, ds_configs/zero3_offload.json, or shorter rows (data.max_tokens).",
        ]
    return [*lines, "", command(loaded, options, words, winner)]


def command(
    loaded: LoadedRecipe, options: PlanOptions, words: Sequence[str], best: Candidate
) -> str:
    """The launch command of a candidate, with the user's own words in front of what was chosen."""
    machines = -(-options.gpus // options.gpus_per_machine)
    launcher = ["deepspeed", *(["--num_nodes", str(machines)] if machines > 1 else [])]
    launcher += ["--num_gpus", str(min(options.gpus, options.gpus_per_machine)), "launch/train.py"]
    chosen = {
        "--deepspeed": _json_path(loaded, best.zero.stage, options),
        "--batch.tokens_per_micro_batch": str(best.budget),
        "--model.activation_checkpointing": str(plan.in_recipe(best.every)),
    }
    kept: list[str] = []
    skip = False
    for word in words:
        name, _, value = word.partition("=")
        if name in chosen:
            skip = not value
            continue
        if not skip or word.startswith("--"):
            kept.append(word)
        skip = False
    return shlex.join([*launcher, *kept, *(word for pair in chosen.items() for word in pair)])


def _checked(options: PlanOptions) -> Gpu:
    for key in ("gpus", "gpus_per_machine", "row_tokens"):
        if (value := vars(options)[key]) < 1:
            raise UserError(f"{key} is {value}; expected a positive number")
    if not 0 < options.learnt_share <= 1:
        raise UserError(
            f"learnt_share is {options.learnt_share}; expected a number above 0, up to 1"
        )
    if (options.gpu_memory is not None and options.gpu_memory <= 0) or (
        options.longest_row or 1
    ) < 1:
        raise UserError("gpu_memory and longest_row: expected positive numbers")
    gpu = gpu_named(options.gpu.lower())
    if gpu is None:
        raise UserError(f"gpu is {options.gpu!r}; expected one of {', '.join(g.key for g in GPUS)}")
    return gpu


def _shape(loaded: LoadedRecipe) -> Shape:
    """Of the recipe's model; of Qwen-7B where the recipe names none."""
    if "model.path" not in loaded.set_keys:
        return Shape.of(QWenConfig())
    return Shape.of(AutoConfig.from_pretrained(find_model(loaded.recipe.model.path, weights=False)))


def _stages(loaded: LoadedRecipe, options: PlanOptions) -> list[Zero]:
    """ZeRO-0 to 3: the recipe's own JSON at its own stage, the project's files at the others."""
    zeros, hidden = [], _shape(loaded).hidden
    for stage in range(4):
        path = _json_path(loaded, stage, options)
        resolved = ds_config.resolve(
            ds_config.read_json(path),
            replace(loaded.recipe, deepspeed=path),
            loaded.set_keys,
            hidden_size=hidden,
            world=options.gpus,
            ranks_per_machine=min(options.gpus, options.gpus_per_machine),
            can_quantise=True,
        )
        zero = Zero.of(resolved.engine_json, options.gpus)
        if zero.stage == stage:  # full training and fp16 make ZeRO-1 of 0
            zeros.append(zero)
    return zeros


def _json_path(loaded: LoadedRecipe, stage: int, options: PlanOptions) -> str:
    own = loaded.recipe.deepspeed
    if (
        own is not None
        and ds_config.read_json(own).get("zero_optimization", {}).get("stage", 0) == stage
    ):
        return own
    several = stage == 3 and options.gpus > options.gpus_per_machine
    return str(Path("ds_configs") / ("zero3_hpz.json" if several else f"zero{stage}.json"))
