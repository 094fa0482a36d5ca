"""One training run from its options to its report, in the order in which things can go wrong."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from transformers import AutoConfig

from qwen_ds import dist
from qwen_ds.data.rows.data_report import data_report
from qwen_ds.data.rows.data_report import summary as data_summary
from qwen_ds.disk.write import write_json
from qwen_ds.errors import EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, UserError
from qwen_ds.machine import choose_device
from qwen_ds.model.family import QWEN
from qwen_ds.plan import deepspeed_json as ds_config
from qwen_ds.plan.shape import Shape
from qwen_ds.recipe.loading import LoadedRecipe
from qwen_ds.recipe.options import Recipe
from qwen_ds.runlog import log_to_file, say
from qwen_ds.train import setup, special_rows
from qwen_ds.train.engine import start
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.loop import train
from qwen_ds.train.observe.run_page import write_report
from qwen_ds.train.observe.summary import RunSummary
from qwen_ds.train.schedule import total_steps
from qwen_ds.train.session import open_session
from qwen_ds.train.survive import resume
from qwen_ds.train.survive import run_folder as runfolder
from qwen_ds.train.survive.checkpoint import Checkpoint
from qwen_ds.train.survive.result import Output
from qwen_ds.train.survive.saver import Saver
from qwen_ds.train.survive.stop import leave_at_signals
from qwen_ds.train.survive.watchdog import Watchdog

log = logging.getLogger(__name__)


def run(loaded: LoadedRecipe, note: str = "") -> int:
    """Train as the recipe says; returns the exit code. `note` is said first.

    Raises:
        UserError: the data, the model or the folder is wrong, or the loss is not finite.
    """
    leave_at_signals()
    launched = dist.has_rendezvous() or dist.world_size() > 1
    timeout_minutes = loaded.recipe.distributed.timeout_minutes
    device = choose_device(loaded.recipe.device)
    # A minute more than the watchdog's patience: it knows more about what happened than a collective does.
    start.start_process_group(device, timeout_minutes + 1)
    watchdog = Watchdog(timeout_minutes, launched=launched)
    watchdog.start()
    try:
        code = run_in_group(loaded, device, watchdog, note)
    except UserError as error:  # reached by every rank, or told to the others
        watchdog.tell(error)
        watchdog.stop()
        start.stop_process_group()
        raise
    except Exception as error:
        end_at_once(error, watchdog)
    watchdog.stop()
    start.stop_process_group()
    return code


def end_at_once(error: Exception, watchdog: Watchdog) -> NoReturn:
    """Say what happened and leave without another word to the peers: any of them may be dead."""
    log.exception("the run has failed")
    if blamed := watchdog.blame(error):
        print(f"error: {blamed}", file=sys.stderr, flush=True)
    else:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(EXIT_FAILURE)


def run_in_group(
    loaded: LoadedRecipe, device: torch.device, watchdog: Watchdog, note: str = ""
) -> int:
    """`run`, once the ranks have met; one rank alone needs no group until the engine starts."""
    folder = Path(loaded.recipe.output_dir)
    dist.once(lambda: runfolder.claim(folder), "claim the run folder")
    log_to_file(folder / "logs")
    if note:
        say(note)
    machines = dist.ranks_per_machine()
    config = ds_config.read_json(loaded.recipe.deepspeed)
    loaded = setup.choose_dtype(setup.find_sources(loaded), device)
    base = AutoConfig.from_pretrained(loaded.recipe.model.path)
    resolved = ds_config.resolve(
        config,
        loaded.recipe,
        loaded.set_keys,
        hidden_size=base.hidden_size,
        world=dist.world_size(),
        ranks_per_machine=math.gcd(*machines),
        can_quantise=start.can_quantise_weights(device),
    )
    start.check_config(resolved.engine_json)
    recipe, rows_note = special_rows.resolve(resolved.recipe)
    setup.check_device(recipe, device)
    recipe = setup.choose_attention(recipe, device)
    found = find_checkpoint(folder, recipe, resolved)
    data = setup.load_data(recipe)
    if found:
        resume.check_same_data(found.state, recipe, data.sha256)
        resume.check_world(found, resolved.stage)
        steps = total_steps(recipe.optim, data.sampler.steps_per_epoch)
        if resume.is_finished(found, folder, recipe, steps):
            say(
                f"{folder} holds a finished run of {found.step} steps; another output_dir begins a new one"
            )
            return EXIT_DONE
    recipe, recomputation = setup.choose_recomputation(recipe, resolved, data, device)
    model = setup.load_model(recipe, resolved, device)
    output = Output(
        folder, Path(recipe.model.path), setup.DTYPES[recipe.model.dtype], model.adapter_config
    )
    say(start_screen(recipe, resolved.stage, data, model, device, found, recomputation))
    if rows_note:
        say(rows_note)
    if recipe.dry_run:
        say("dry run: everything is in order; nothing was trained")
        return EXIT_DONE
    if dist.rank() == 0:
        stored = replace(
            recipe,
            deepspeed=str((folder / runfolder.DS_CONFIG).resolve()),
            resume=type(recipe.resume)(),
        )
        runfolder.write_resolved(folder, stored, resolved.stored_json(), device, model.count)
        write_json(
            folder / "data_report.json",
            data_report(data.train.report, None if data.eval is None else data.eval.report),
        )
    engine = TrainingEngine(model.training, recipe.optim, resolved)
    identity = resume.identity(recipe, resolved.stored_json(), data.sha256)
    saver = Saver(output, identity, recipe.save.keep, watchdog, found)
    if found:
        resume.restore(engine, found)
    encoding = QWEN.load_encoding(recipe.model.path)
    summary = train(open_session(recipe, data, engine, saver, Shape.of(base), encoding))
    watchdog.idle()
    return finish(folder, summary, output, model)


def find_checkpoint(
    folder: Path, recipe: Recipe, resolved: ds_config.ResolvedConfig
) -> Checkpoint | None:
    """The checkpoint to go on from, once it is clear that the folder holds this run; None: from the start."""
    if not dist.from_rank_0(runfolder.holds_run(folder)):
        return None
    dist.once(
        lambda: resume.check_same_run(folder, recipe, resolved.stored_json()), "compare the recipes"
    )
    return resume.find(folder)


def finish(folder: Path, outcome: RunSummary, output: Output, model: setup.Model) -> int:
    """Report and exit code."""
    if outcome.stopped_by:
        say(
            f"stopped by {outcome.stopped_by} after step {outcome.steps}, which is saved; the same command goes on"
        )
        dist.barrier()
        return EXIT_STOPPED
    if dist.rank() == 0:
        write_report(folder, str(outcome), str(model.count))
        say(
            f"{outcome}\n{folder / output.name} holds the result, {folder / 'loss.png'} the curve, "
            f"{folder / 'report.html'} all of it"
        )
    dist.barrier()
    return EXIT_DONE


def start_screen(
    recipe: Recipe,
    stage: int,
    data: setup.Data,
    model: setup.Model,
    device: torch.device,
    found: Checkpoint | None,
    recomputation: str,
) -> str:
    """What is about to happen, before the first step."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} thread(s)"
    )
    steps = total_steps(recipe.optim, data.sampler.steps_per_epoch)
    lens = data.train.lens
    rows, *remarks = data_summary(data.train.report)
    if data.eval is not None:
        rows += f"; {len(data.eval):,} rows for evaluation"
    resumed = []
    if found:
        state = found.state
        resumed = [
            f"resumed   {found.folder}: step {found.step} of {steps}, saved by {state['ranks']} rank(s) under "
            f"ZeRO-{state['zero_stage']}"
        ]
    return "\n".join(
        [
            f"model     {recipe.model.path} ({recipe.model.dtype}), {recipe.method}: {model.count}",
            f"machine   {dist.world_size()} rank(s) of {name}, ZeRO-{stage}",
            f"data      {rows}",
            *(f"          {remark}" for remark in remarks),
            f"training  {steps} steps of {recipe.batch.rows_per_step} rows, about "
            f"{int(lens.mean() * min(recipe.batch.rows_per_step, len(lens))):,} tokens each; lr {recipe.optim.lr:g} "
            f"{recipe.optim.schedule}",
            *([f"memory    {recomputation}"] if recomputation else []),
            *resumed,
            f"disk      {disk_use(recipe, steps, data, model)}",
            f"results   {recipe.output_dir}   (tensorboard --logdir {Path(recipe.output_dir).parent})",
        ]
    )


def disk_use(recipe: Recipe, steps: int, data: setup.Data, model: setup.Model) -> str:
    """What the checkpoints will take: 12 bytes a trainable parameter (value and two moments in fp32), and for full
    training the model itself."""
    each = 12 * model.count.trainable
    if model.adapter_config is None:
        each += setup.DTYPES[recipe.model.dtype].itemsize * model.count.total
    saves = math.ceil(steps / recipe.save.every_steps)
    if data.eval is not None:  # each evaluation may be the best so far, which is saved and kept
        saves += math.ceil(steps / (recipe.eval.every_steps or data.sampler.steps_per_epoch))
    count = (
        min(saves, recipe.save.keep + (data.eval is not None)) + 1
    )  # and the one that is being written
    free = shutil.disk_usage(recipe.output_dir).free if dist.rank() == 0 else math.inf
    text = (
        f"at most {count} checkpoints of {_gb(each)}, {_gb(count * each)} in all; {_gb(free)} free"
    )
    return text if count * each < free else f"{text}: TOO LITTLE; lower save.keep or clear the disk"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
