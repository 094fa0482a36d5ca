"""One training run, once the ranks have met, in the order in which things can go wrong."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from qwen_ds import dist
from qwen_ds.errors import EXIT_DONE
from qwen_ds.plan.recomputation import decide_recomputation
from qwen_ds.recipe.loading import LoadedRecipe
from qwen_ds.runlog import log_to_file, say
from qwen_ds.train import rehearsal, screen, setup, survey
from qwen_ds.train.cpu_shapes import use_few_shapes
from qwen_ds.train.loop import train
from qwen_ds.train.session import open_session
from qwen_ds.train.survive import resume, run_folder
from qwen_ds.train.survive.identity import WholeFiles, files_of
from qwen_ds.train.survive.watchdog import Watchdog


def run_in_group(
    asked: LoadedRecipe, device: torch.device, watchdog: Watchdog, note: str = ""
) -> int:
    """Train as the recipe says; returns the exit code (a collective throughout; see `run`).

    One rank alone needs no process group until the engine starts.
    """
    folder = Path(asked.recipe.output_dir)
    with ExitStack() as held:
        # Rank 0 alone, for as long as the run lives; a second run on the folder ends here, on all
        # of its ranks, before it has written anything.
        claim = partial(held.enter_context, run_folder.claimed(folder))
        dist.once(claim, "claim the run folder")
        return _run(asked, device, watchdog, note, held)


def _run(
    asked: LoadedRecipe, device: torch.device, watchdog: Watchdog, note: str, held: ExitStack
) -> int:
    folder = Path(asked.recipe.output_dir)
    log_to_file(folder / "logs")
    if note:
        say(note)
    run = survey.decide(resume.with_measured(asked, device), device)
    found, began = resume.find_checkpoint(run, survey.beginning(run))
    data = setup.load_data(run)
    if found and resume.nothing_is_left(found, run, data.sha256, data.sampler.steps_per_epoch):
        say(f"{folder} holds a finished run of {found.step} steps; another output_dir begins anew")
        return EXIT_DONE
    run = decide_recomputation(run, *data.sizes)
    held.enter_context(rehearsal.memory_is_told(run, data, lambda: watchdog.position))
    model = setup.load_model(run, device)
    if device.type == "cpu" and run.recipe.model.compile is True:
        transformer, stage = model.training.transformer, run.deepspeed.stage
        use_few_shapes(transformer, data.sampler, partitioned=stage == 3)
    say(screen.start_screen(run, model, data, found))
    if run.recipe.dry_run:
        say("dry run: everything is in order; nothing was trained")
        return EXIT_DONE
    whole: WholeFiles | None = None
    if dist.rank() == 0:
        run_folder.write_resolved(run, device, model.count, data.report(), began)
        unsure = found.folder if found and resume.is_unsure(found) else None
        identity = folder / run_folder.IDENTITY
        whole = held.enter_context(WholeFiles(began, files_of(run), identity, unsure))
    session = open_session(run, data, model, watchdog, found, whole)
    if run.recipe.batch.rehearse is True and session.start[0] < session.steps:
        rehearsal.rehearse(session)
    summary = train(session)
    watchdog.idle()
    return screen.finish(summary, session.saver.output)
