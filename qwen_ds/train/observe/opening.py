"""The progress of a run, opened as it begins or resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_ds import dist
from qwen_ds.plan.run import Run
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.observe.metrics import Hardware
from qwen_ds.train.observe.progress import Progress
from qwen_ds.train.observe.trackers import open_writers
from qwen_ds.train.observe.writers import TrackedRun, Writers, settings_of
from qwen_ds.train.setup import Data


def open_progress(
    run: Run, data: Data, engine: TrainingEngine, steps: int, saved: dict[str, Any] | None
) -> Progress:
    """Open metrics.jsonl and all that lies beside it; on rank 0 also the writers.

    Args:
        steps: of the whole run.
        saved: see Progress.
    """
    recipe, folder = run.recipe, Path(run.recipe.output_dir)
    hardware = Hardware.of(engine.device, run.shape, recipe.method)
    writers = Writers()
    if dist.rank() == 0:
        tracked = TrackedRun(
            folder=folder,
            project=recipe.log.project,
            name=recipe.log.run_name or folder.resolve().name,
            settings=settings_of(recipe, dist.world_size(), engine.stage),
            first_step=saved["outcome"]["steps"] if saved else 0,
            # Checkpoints of earlier releases have none.
            known_as=saved.get("trackers", {}) if saved else {},
        )
        writers = open_writers(tracked, recipe.log.trackers)
        if tracked.first_step == 0:
            writers.lengths(data.train.lens, data.train.learnt)
    return Progress(folder, steps, recipe.log.every_steps, hardware, writers, saved)
