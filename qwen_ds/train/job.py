"""One training run, once the ranks have met, in the order in which things can go wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qwen_ds import dist
from qwen_ds.disk.write import write_json
from qwen_ds.errors import EXIT_DONE
from qwen_ds.plan.recomputation import decide_recomputation
from qwen_ds.plan.run import Run
from qwen_ds.recipe.loading import LoadedRecipe
from qwen_ds.recipe.options import ResumeOptions
from qwen_ds.runlog import log_to_file, say
from qwen_ds.train import screen, setup, survey
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.loop import train
from qwen_ds.train.schedule import total_steps
from qwen_ds.train.session import open_session
from qwen_ds.train.survive import resume, run_folder
from qwen_ds.train.survive.checkpoint import Checkpoint
from qwen_ds.train.survive.saver import Saver
from qwen_ds.train.survive.watchdog import Watchdog


def run_in_group(
    asked: LoadedRecipe, device: torch.device, watchdog: Watchdog, note: str = ""
) -> int:
    """Train as the recipe says; returns the exit code (a collective throughout).

    One rank alone needs no process group until the engine starts.

    Raises:
        UserError: the data, the model or the folder is wrong, or the loss is not finite.
    """
    folder = Path(asked.recipe.output_dir)
    # Rank 0 makes the folder, while the others wait.
    dist.once(lambda: run_folder.claim(folder), "claim the run folder")
    log_to_file(folder / "logs")
    if note:
        say(note)
    run = survey.decide(asked, device)
    found = find_checkpoint(run)
    data = setup.load_data(run)
    if found and nothing_is_left(found, run, data):
        say(f"{folder} holds a finished run of {found.step} steps; another output_dir begins anew")
        return EXIT_DONE
    run = decide_recomputation(run, int(data.train.lens.max()), len(data.train))
    model = setup.load_model(run, device)
    say(screen.start_screen(run, model, data, found))
    if run.recipe.dry_run:
        say("dry run: everything is in order; nothing was trained")
        return EXIT_DONE
    return carry_out(run, data, model, watchdog, found, device)


def find_checkpoint(run: Run) -> Checkpoint | None:
    """The checkpoint to resume from, once it is clear that the folder holds this run.

    None: from the start. A collective: rank 0 alone may see the folder.
    """
    if not dist.from_rank_0(run_folder.holds_run(run.folder)):
        return None
    ds_json = run.deepspeed.stored_json()
    dist.once(lambda: resume.check_same_run(run.folder, run.recipe, ds_json), "compare the recipes")
    return resume.find(run.folder)


def nothing_is_left(found: Checkpoint, run: Run, data: setup.Data) -> bool:
    """Whether the checkpoint is of a finished run (a collective).

    Raises:
        UserError: the run began with other rows, or its pieces do not fit this world.
    """
    recipe = run.recipe
    resume.check_same_data(found.state, recipe, data.sha256)
    resume.check_world(found, run.deepspeed.stage)
    steps = total_steps(recipe.optim, data.sampler.steps_per_epoch)
    return resume.is_finished(found, run.folder, recipe, steps)


def carry_out(
    run: Run,
    data: setup.Data,
    model: setup.Model,
    watchdog: Watchdog,
    found: Checkpoint | None,
    device: torch.device,
) -> int:
    """Train, once everything is loaded and checked; returns the exit code."""
    ds_json = run.deepspeed.stored_json()
    if dist.rank() == 0:
        # A run that is started from its stored recipe says anew what may differ.
        path = str((run.folder / run_folder.DS_CONFIG).resolve())
        recipe = replace(run.recipe, deepspeed=path, resume=ResumeOptions())
        run_folder.write_resolved(run.folder, recipe, ds_json, device, model.count)
        write_json(run.folder / "data_report.json", data.report())
    engine = TrainingEngine(model.training, run.recipe.optim, run.deepspeed)
    identity = resume.identity(run.recipe, ds_json, data.sha256)
    output = setup.output_of(run, model)
    saver = Saver(output, identity, run.recipe.save.keep, watchdog, found)
    if found:
        resume.restore(engine, found)
    summary = train(open_session(run.recipe, data, engine, saver, run.shape, run.encoding))
    watchdog.idle()
    return screen.finish(summary, output, model.count)
