"""The run folder: who may write into it, and what it says about the run."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwen_ds import dist
from qwen_ds.disk.lock import holding
from qwen_ds.disk.place import require_folder, unwritable
from qwen_ds.disk.write import unfinished_name, write_json
from qwen_ds.errors import UserError
from qwen_ds.plan.run import Run
from qwen_ds.recipe.loading import write_recipe
from qwen_ds.recipe.options import ResumeOptions
from qwen_ds.runlog import say
from qwen_ds.train.lora import ParameterCount
from qwen_ds.train.survive.identity import Began

RECIPE, DS_CONFIG, REPORT = "recipe.yaml", "ds_config.json", "report.html"
ENVIRONMENT, DATA_REPORT, IDENTITY = "environment.json", "data_report.json", "identity.json"
LOCK = ".lock"
# A start that was killed may leave these. recipe.yaml comes last and makes the folder a run's.
_SETTINGS = (DS_CONFIG, DATA_REPORT, ENVIRONMENT, IDENTITY)
BEFORE_THE_RECIPE = {"logs", LOCK, *_SETTINGS} | {
    unfinished_name(Path(name)).name for name in (RECIPE, *_SETTINGS)
}


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the run folder, as `claim` makes it, against every other run; rank 0 only.

    Raises UserError as `claim` does, or if another run writes into it: the message names its host
    and process.
    """
    claim(folder)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(holding(folder / LOCK, f"output_dir {folder}", say))
        except OSError as error:
            raise unwritable(folder, error) from error
        yield


def claim(folder: Path) -> None:
    """Make the run folder, or accept one that holds a run.

    Raises UserError if it holds something else. Nothing in it is touched.
    """
    if folder.is_dir() and not holds_run(folder):
        strangers = {path.name for path in folder.iterdir()} - BEFORE_THE_RECIPE
        if strangers:
            raise UserError(
                f"output_dir {folder} holds {min(strangers)!r} and is no run folder; expected a "
                f"run folder, or a new or empty one; nothing was changed"
            )
    require_folder(folder, make=True)


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (folder / RECIPE).is_file()


def is_finished(folder: Path) -> bool:
    """Whether the result and the report, which is written last, are there."""
    results = (folder / name for name in ("adapter", "model"))
    return (folder / REPORT).is_file() and any(result.is_dir() for result in results)


def write_resolved(
    run: Run,
    device: torch.device,
    count: ParameterCount,
    data_report: dict[str, Any],
    began: Began,
) -> None:
    """Write recipe.yaml, ds_config.json and environment.json, with which a run can be repeated,
    data_report.json, and identity.json, by which it is known."""
    folder, on_gpu, cpu = run.folder, device.type == "cuda", f"cpu ({platform.machine()})"
    write_json(folder / DS_CONFIG, run.deepspeed.stored_json())
    write_json(folder / DATA_REPORT, data_report)
    write_json(folder / IDENTITY, began.as_json())
    environment = {
        "command": sys.argv,
        "ranks": dist.world_size(),
        "trainable_parameters": count.trainable,
        "total_parameters": count.total,
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "threads_per_rank": torch.get_num_threads(),
        **began.versions,
        "cuda": torch.version.cuda,
    }
    write_json(folder / ENVIRONMENT, environment)
    # Last: a folder with a recipe is a run's, and the next start compares it. It has no `resume`: a
    # run that is started from its stored recipe says anew what may differ.
    path = str((folder / DS_CONFIG).resolve())
    write_recipe(replace(run.recipe, deepspeed=path, resume=ResumeOptions()), folder / RECIPE)
