"""The lines that a person at the terminal reads: before the first step, and after the last."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import torch

from qwen_ds import dist
from qwen_ds.data.doctor.brief import lines as checked_lines
from qwen_ds.data.rows.data_report import not_read_lines
from qwen_ds.data.rows.data_report import summary as data_summary
from qwen_ds.errors import EXIT_DONE, EXIT_STOPPED
from qwen_ds.model.attention_kernels import attention_kernels
from qwen_ds.model.liger import OLDEST
from qwen_ds.plan.run import Note, Run
from qwen_ds.runlog import say
from qwen_ds.train.observe.run_page import write_report
from qwen_ds.train.observe.summary import RunSummary
from qwen_ds.train.schedule import total_steps
from qwen_ds.train.setup import Data, Model
from qwen_ds.train.survive.checkpoint import Checkpoint
from qwen_ds.train.survive.result import Output


def start_screen(run: Run, model: Model, data: Data, found: Checkpoint | None) -> str:
    """Everything that is about to happen, and each choice that was made for the user."""
    recipe, lens = run.recipe, data.train.lens
    rows_per_step = recipe.batch.rows_per_step
    steps = total_steps(recipe.optim, data.sampler.steps_per_epoch)
    rows, *remarks = data_summary(data.train.report)
    if data.eval is not None:
        rows += f"; {len(data.eval):,} rows for evaluation"
    if data.eval is not None and recipe.data.eval:  # else these rows are some of data.train
        remarks += [f"evaluation: {line}" for line in not_read_lines(data.eval.report)]
    tokens = int(lens.mean() * min(rows_per_step, len(lens)))
    lines = [
        f"model     {recipe.model.path} ({recipe.model.dtype}), {recipe.method}: {model.count}",
        f"machine   {run.machine.ranks} rank(s) of {device_name(run)}, ZeRO-{run.deepspeed.stage}",
        f"attention {recipe.model.attention}, by {kernels(run, data)}",
        *pieces_lines(run),
        f"data      {rows}",
        *(f"          {remark}" for remark in remarks),
        *(f"checked   {line}" for line in checked_lines(data.findings)),
        f"training  {steps} steps of {rows_per_step} rows, about {tokens:,} tokens each; "
        f"lr {recipe.optim.lr:g} {recipe.optim.schedule}",
        *(f"chosen    {note}" for note in (*run.notes, *micro_batch_notes(run, data))),
    ]
    if found:
        lines.append(
            f"resumed   {found.folder}: step {found.step} of {steps}, saved by "
            f"{found.state['ranks']} rank(s) under ZeRO-{found.state['zero_stage']}"
        )
    lines += [
        f"disk      {disk_use(run, steps, data, model)}",
        f"results   {recipe.output_dir}   (tensorboard --logdir {run.folder.parent})",
    ]
    return "\n".join(lines)


def kernels(run: Run, data: Data) -> str:
    """The kernels that compute attention, over all lengths to which rows are padded."""
    lengths = np.unique(data.sampler.padded_lens).tolist()
    budget = data.sampler.budget
    device = torch.device("cuda" if run.machine.on_gpu else "cpu")
    shapes = ((max(1, budget // length), length) for length in lengths)
    config = copy.copy(run.base.config)
    config._attn_implementation = run.recipe.model.attention
    return attention_kernels(config, shapes, run.dtype, device)


def micro_batch_notes(run: Run, data: Data) -> list[Note]:
    """The note that micro-batches have fewer tokens than the recipe allows, if they have."""
    asked, taken = run.recipe.batch.tokens_per_micro_batch, data.sampler.budget
    if taken == asked:
        return []
    reason = f"up to {asked:,} would hold rows of less equal lengths, and more padding"
    return [Note("batch.tokens_per_micro_batch", taken, reason)]


def pieces_lines(run: Run) -> list[str]:
    """On GPUs that compile nothing: who computes what lies between the products of a block."""
    if not run.machine.on_gpu or run.recipe.model.compile:
        return []
    if missing := run.machine.missing_to_compile(run.recipe.model.dtype):
        return [f"pieces    torch; liger-kernel needs {missing}"]
    if run.liger is None:
        oldest = ".".join(map(str, OLDEST))
        return [
            "pieces    torch; expected one version of liger-kernel on every rank, from "
            f"{oldest} (the extra gpu), for one kernel each"
        ]
    return [f"pieces    liger-kernel {run.liger}: norm and gate; torch: rotation"]


def device_name(run: Run) -> str:
    """The device of this rank, as its maker calls it."""
    if run.machine.on_gpu:
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread(s)"


def disk_use(run: Run, steps: int, data: Data, model: Model) -> str:
    """The room that checkpoints will take, and a warning if the disk lacks it.

    Each checkpoint has 12 bytes for a trainable parameter (value and two moments in fp32). In full
    training one that is the best at its time has the model itself, too, and so has the result.
    """
    recipe = run.recipe
    each = 12 * model.count.trainable
    result = 0 if model.adapter_config else run.dtype.itemsize * model.count.total
    if data.eval is not None:
        each += result
    saves = math.ceil(steps / recipe.save.every_steps)
    if data.eval is not None:  # each evaluation may be the best so far, which is saved and kept
        saves += math.ceil(steps / (recipe.eval.every_steps or data.sampler.steps_per_epoch))
    # One more is being written.
    assert recipe.save.keep is not None  # resolve() has set it
    count = min(saves, recipe.save.keep + (data.eval is not None)) + 1
    total = count * each + result
    free = shutil.disk_usage(run.folder).free if dist.rank() == 0 else math.inf
    needed = f"at most {count} checkpoints of {_gb(each)}, {_gb(total)} in all"
    warning = "" if total < free else ": TOO LITTLE; lower save.keep or clear the disk"
    return f"{needed}; {_gb(free)} free{warning}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def finish(summary: RunSummary, output: Output) -> int:
    """Write the report of a finished run; returns the exit code (a collective)."""
    folder = output.folder
    if summary.stopped_by:
        say(
            f"stopped by {summary.stopped_by} after step {summary.steps}, which is saved; the same "
            "command resumes"
        )
    elif dist.rank() == 0:
        write_report(folder)
        say(
            f"{summary}\n{folder / output.name} holds the result, {folder / 'loss.png'} the curve, "
            f"{folder / 'report.html'} all of it"
        )
    # All ranks, once: none leaves before rank 0 has written, or launchers would end the others.
    dist.barrier()
    return EXIT_STOPPED if summary.stopped_by else EXIT_DONE
