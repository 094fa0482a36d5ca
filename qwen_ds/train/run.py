"""One training run from its options to its report, in the order in which things can go wrong."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

from qwen_ds import dist
from qwen_ds.config import LoadedRecipe, Recipe
from qwen_ds.data.report import data_report, summary
from qwen_ds.errors import UserError
from qwen_ds.model.folder import write_json
from qwen_ds.report import write_report
from qwen_ds.runlog import log_to_file, say
from qwen_ds.train import ds_config, engine, runfolder, setup
from qwen_ds.train.loop import total_steps, train
from qwen_ds.train.output import Output

log = logging.getLogger(__name__)


def run(loaded: LoadedRecipe, note: str = "") -> int:
    """Train as the recipe says; returns the exit code. `note` is said first.

    Raises:
        UserError: the data, the model or the folder is wrong, or the loss is not finite.
    """
    device = engine.choose_device(loaded.recipe.device)
    engine.start_process_group(device, loaded.recipe.distributed.timeout_minutes)
    try:
        code = run_in_group(loaded, device, note)
    except UserError:  # reached by every rank; after any other error the peers may wait in a collective for ever
        engine.stop_process_group()
        raise
    engine.stop_process_group()
    return code


def run_in_group(loaded: LoadedRecipe, device: torch.device, note: str = "") -> int:
    """`run`, once the ranks have met; one rank alone needs no group until the engine starts."""
    folder = Path(loaded.recipe.output_dir)
    dist.once(lambda: runfolder.claim(folder), "claim the run folder")
    log_to_file(folder / "logs")
    if note:
        say(note)
    config = ds_config.read_json(loaded.recipe.deepspeed)
    loaded = setup.find_sources(loaded)
    hidden_size = AutoConfig.from_pretrained(loaded.recipe.model.path).hidden_size
    resolved = ds_config.resolve(
        config, loaded.recipe, loaded.set_keys, hidden_size=hidden_size, world=dist.world_size()
    )
    engine.check_config(resolved.engine_json)
    recipe = resolved.recipe
    setup.check_device(recipe, device)
    data = setup.load_data(recipe)
    recipe, recomputation = setup.choose_recomputation(recipe, resolved, data, device)
    model = setup.load_model(recipe, resolved, device)
    output = Output(folder, Path(recipe.model.path), setup.DTYPES[recipe.model.dtype], model.adapter_config)
    say(start_screen(recipe, resolved.stage, data, model, device, recomputation))
    if recipe.dry_run:
        say("dry run: everything is in order; nothing was trained")
        return 0
    if dist.rank() == 0:
        stored = replace(recipe, deepspeed=str((folder / "ds_config.json").resolve()))
        runfolder.write_resolved(folder, stored, resolved.stored_json(), device, model.count)
        write_json(
            folder / "data_report.json", data_report(data.train.report, None if data.eval is None else data.eval.report)
        )
    outcome = train(recipe, data, engine.Engine(model.training, recipe.optim, resolved), output)
    if dist.rank() == 0:
        result = folder / ("adapter" if model.adapter_config else "model")
        write_report(folder, str(outcome), str(model.count))
        say(
            f"{outcome}\n{result} holds the result, {folder / 'loss.png'} the curve, {folder / 'report.html'} all of it"
        )
    dist.barrier()
    return 0


def start_screen(
    recipe: Recipe, stage: int, data: setup.Data, model: setup.Model, device: torch.device, recomputation: str
) -> str:
    """What is about to happen, before the first step."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    steps = total_steps(recipe, data.sampler.steps_per_epoch)
    lens = data.train.lens
    rows, *remarks = summary(data.train.report)
    if data.eval is not None:
        rows += f"; {len(data.eval):,} rows for evaluation"
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
            f"results   {recipe.output_dir}   (tensorboard --logdir {Path(recipe.output_dir).parent})",
        ]
    )
