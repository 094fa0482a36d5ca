"""The answer of launch/plan.py: the table of candidates, and the command of the best."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from qwen_ds.errors import UserError
from qwen_ds.plan import flops
from qwen_ds.plan.candidates import Candidate, best, candidates
from qwen_ds.plan.gpus import GPUS, Gpu, gpu_named
from qwen_ds.plan.memory import official_memory
from qwen_ds.plan.recomputation import MARGIN, in_recipe
from qwen_ds.plan.resolve import resolve
from qwen_ds.plan.run import Base, Machine, Run
from qwen_ds.plan.seconds import Cluster
from qwen_ds.plan.step import Workload
from qwen_ds.plan.traffic import Links
from qwen_ds.recipe.deepspeed_json import read_deepspeed_json
from qwen_ds.recipe.loading import LoadedRecipe
from qwen_ds.recipe.ranges import PositiveFloat, PositiveInt, Share

COLUMNS = (
    "ZeRO  micro-batch  recomputed   weights  trained  gradients  activations   head  buffers"
    "  context  = GB    s/step  tokens/s/GPU   MFU"
)
MEMORY_WIDTHS = (9, 8, 10, 12, 6, 8, 8, 6)  # of the parts of `Memory`, in its order, and their sum


@dataclass(frozen=True)
class PlanOptions:
    """The machine, and what the rows are like."""

    gpus: PositiveInt = 8
    """GPUs in all."""
    gpu_memory: PositiveFloat | None = None
    """Memory of each in GB (10^9 bytes). Unset: what the GPU is sold with."""
    gpu: str = "h100"
    """Which GPU: a100, a800, h100, h800, h20, h200, l40s, rtx4090 ..."""
    gpus_per_machine: PositiveInt = 8
    """GPUs of one machine; between machines 400 Gb/s for each GPU are assumed."""
    row_tokens: PositiveInt = 157
    """Median tokens of a row, prompt and answer (AdvertiseGen: 157)."""
    learnt_share: Share = 0.66
    """Share of target tokens (AdvertiseGen: 0.66)."""
    longest_row: PositiveInt | None = None
    """Tokens of the longest row. Unset: data.max_tokens, else data.max_prompt_tokens +
    data.max_answer_tokens."""
    every_choice: bool = False
    """Show several choices of recomputation, not only the one that training would make."""

    @property
    def gpus_here(self) -> int:
        """GPUs used on a machine."""
        return min(self.gpus, self.gpus_per_machine)


@dataclass(frozen=True, slots=True)
class Planned:
    """All ways to run a recipe, and the workload that they were planned for."""

    options: PlanOptions
    cluster: Cluster
    runs: list[Run]
    """One for each ZeRO stage."""
    workload: Workload
    found: list[Candidate]


def plan(asked: LoadedRecipe, options: PlanOptions, base: Base) -> Planned:
    """Predict every ZeRO stage and micro-batch size, from the `Run` that training would make.
    UserError: an unknown GPU, DoRA, or what the recipe and its JSON are refused for."""
    gpu = gpu_named(options.gpu.lower())
    if gpu is None:
        known = ", ".join(each.key for each in GPUS)
        raise UserError(f"gpu is {options.gpu!r}; expected one of {known}")
    runs = _runs(asked, options, machine_of(options, gpu), base)
    recipe = runs[0].recipe
    if recipe.lora.variant == "dora" and recipe.method == "lora":
        expected = "expected lora or rslora"
        raise UserError(f"lora.variant is dora, whose memory is not predicted; {expected}")
    data, rows = recipe.data, recipe.batch.rows_per_step
    single_turn = data.max_prompt_tokens + data.max_answer_tokens
    longest = options.longest_row or data.max_tokens or single_turn
    workload = Workload.like(rows, options.row_tokens, options.learnt_share, longest)
    cluster = Cluster(gpu, Links(options.gpus_per_machine, gpu.link))
    found = candidates(runs, cluster, workload, (0, 2, 1) if options.every_choice else None)
    return Planned(options, cluster, runs, workload, found)


def machine_of(options: PlanOptions, gpu: Gpu) -> Machine:
    memory = (options.gpu_memory or gpu.memory_gb) * 1e9
    return Machine(
        options.gpus,
        options.gpus_here,
        True,
        memory,
        "of the GPU",
        fast_bf16=gpu.has_bf16,
        can_quantise=True,
    )


def _runs(asked: LoadedRecipe, options: PlanOptions, machine: Machine, base: Base) -> list[Run]:
    """Runs under ZeRO-0 to 3: the recipe's own JSON at its stage, ds_configs/ at the others."""
    own, runs = asked.recipe.deepspeed, []
    own_stage = read_deepspeed_json(own).get("zero_optimization", {}).get("stage", 0)
    for stage in range(4):
        several = stage == 3 and options.gpus > options.gpus_per_machine
        path = "ds_configs/zero3_hpz.json" if several else f"ds_configs/zero{stage}.json"
        path = own if own is not None and stage == own_stage else path
        recipe = replace(asked.recipe, deepspeed=path)
        run = resolve(replace(asked, recipe=recipe), machine, base, rows=False)
        if run.deepspeed.stage == stage:  # `resolve` may turn stage 0 into 1, which is in the list
            runs.append(run)
    return runs


def plan_text(planned: Planned, words: Sequence[str]) -> str:
    """The whole answer; `words` are the recipe's options as the user gave them."""
    run, workload, options = planned.runs[0], planned.workload, planned.options
    shape, recipe, trained = run.shape, run.recipe, run.saving.trained_parameters(run.shape)
    gpu, tokens = planned.cluster.gpu, float(workload.lens.sum())
    needed = flops.step_flops(
        shape,
        method=recipe.method,
        tokens=tokens,
        targets=tokens * workload.target_share,
        squared_tokens=float((workload.lens**2.0).sum()),
    )
    lines = [
        f"{shape.parameters / 1e9:.2f} billion parameters, {trained / 1e6:,.1f} million trained "
        f"({recipe.method}); {options.gpus} x {gpu.key} with {run.memory[0] / 1e9:g} GB, of "
        f"which {MARGIN:.0%} stay free",
        f"{recipe.batch.rows_per_step} rows a step, {int(workload.lens.mean())} tokens each and "
        f"{workload.longest} at most",
        # Those of every stage: the user's own JSON is at one of them.
        *dict.fromkeys(str(note) for each in planned.runs for note in each.notes),
        "",
        COLUMNS,
    ]
    winner = best(planned.found)
    for candidate in planned.found:
        seconds = candidate.seconds.total
        rate = tokens / seconds / options.gpus
        share = flops.utilisation(needed, seconds, options.gpus, gpu)
        end = "  best" if candidate is winner else "" if candidate.fit.fits else "  does not fit"
        lines.append(f"{_row(candidate)}  {seconds:6.2f}  {rate:12,.0f}  {share:4.0%}{end}")
    return "\n".join([*lines, "", *_closing(planned, words, winner)])


def _row(candidate: Candidate) -> str:
    memory, every = candidate.fit.memory, candidate.fit.every
    recomputed = str(in_recipe(every)) if every < 2 else f"1 in {every}"
    columns = zip((*astuple(memory), memory.total), MEMORY_WIDTHS, strict=True)
    values = " ".join(f"{size / 1e9:{width}.2f}" for size, width in columns)
    stage = candidate.run.deepspeed.stage
    return f"{stage:>4}  {candidate.budget:>11}  {recomputed:<11}{values}"


def _closing(planned: Planned, words: Sequence[str], winner: Candidate | None) -> list[str]:
    run, longest, lines = planned.runs[0], planned.workload.longest, []
    if any(each.zero.offload_optimizer or each.zero.offload_parameters for each in planned.runs):
        lines.append("Times leave out what offloading copies to and from the host's memory.")
    if run.recipe.model.dtype == "bfloat16" and not planned.cluster.gpu.has_bf16:
        lines.append("Times are those of float16; emulated, bfloat16 takes longer.")
    if run.recipe.method == "lora":
        official = official_memory(run.shape, longest, embedding=False)
        of = f"The official finetune.py (r 64, one row of {longest} tokens)"
        lines.append(f"{of} would hold {official / 1e9:.1f} GB.")
    if winner is not None:
        return [*lines, "", command(planned, words, winner)]
    nothing = "Nothing fits: more GPUs, ds_configs/zero3_offload.json, or shorter rows"
    return [*lines, f"{nothing} (data.max_tokens)."]


def command(planned: Planned, words: Sequence[str], chosen: Candidate) -> str:
    """The launch command of a candidate: the user's own words, then what was chosen."""
    options = planned.options
    machines = -(-options.gpus // options.gpus_per_machine)
    launcher = ["deepspeed", *(["--num_nodes", str(machines)] if machines > 1 else [])]
    launcher += ["--num_gpus", str(options.gpus_here), "launch/train.py"]
    decided = {
        "--deepspeed": str(chosen.run.recipe.deepspeed),
        "--batch.tokens_per_micro_batch": str(chosen.budget),
        "--model.activation_checkpointing": str(in_recipe(chosen.fit.every)),
    }
    kept = without_options(words, set(decided))
    return shlex.join([*launcher, *kept, *(word for pair in decided.items() for word in pair)])


def without_options(words: Sequence[str], names: set[str]) -> list[str]:
    """A command line without these options (`--name`) and their values."""
    kept, skip = [], False
    for word in words:
        if word.startswith("--"):
            skip = word.partition("=")[0] in names
        if not skip:
            kept.append(word)
    return kept
