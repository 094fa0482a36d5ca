"""The run folder: who may write into it, and what it says about the run."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qwen_ds import dist
from qwen_ds.disk.place import require_folder
from qwen_ds.disk.write import write_json
from qwen_ds.errors import UserError
from qwen_ds.recipe.loading import write_recipe
from qwen_ds.recipe.options import Recipe
from qwen_ds.train.lora import ParameterCount

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "datasets",
    "tiktoken",
    "safetensors",
    "numpy",
)
# What a start that was killed may leave before recipe.yaml, which is written last and makes the folder a run's.
BEFORE_THE_RECIPE = ("logs", "ds_config.json", "environment.json", ".recipe.yaml.unfinished",
                     ".ds_config.json.unfinished", ".environment.json.unfinished")  # fmt: skip
RECIPE, DS_CONFIG, REPORT = "recipe.yaml", "ds_config.json", "report.html"


def claim(folder: Path) -> None:
    """Make the run folder ours; rank 0 only. A folder that holds a run is gone on with.

    Raises:
        UserError: it holds something else. Nothing in it is touched.
    """
    if folder.is_dir() and not holds_run(folder):
        strangers = sorted(p.name for p in folder.iterdir() if p.name not in BEFORE_THE_RECIPE)
        if strangers:
            raise UserError(
                f"output_dir {folder} holds {strangers[0]!r} and is no run folder; expected a run folder, or a new or "
                f"empty one; nothing was changed"
            )
    require_folder(folder, make=True)


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (folder / RECIPE).is_file()


def is_finished(folder: Path) -> bool:
    """Whether the result and the report, which is written last, are there."""
    return (folder / REPORT).is_file() and any(
        (folder / name).is_dir() for name in ("adapter", "model")
    )


def write_resolved(
    folder: Path,
    recipe: Recipe,
    ds_json: dict[str, Any],
    device: torch.device,
    count: ParameterCount,
) -> None:
    """recipe.yaml, ds_config.json, environment.json: running them again reproduces the run."""
    write_json(folder / DS_CONFIG, ds_json)
    write_json(
        folder / "environment.json",
        {
            "command": sys.argv,
            "ranks": dist.world_size(),
            "trainable_parameters": count.trainable,
            "total_parameters": count.total,
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"cpu ({platform.machine()})",
            "threads_per_rank": torch.get_num_threads(),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: metadata.version(name) for name in PACKAGES},
        },
    )
    # Last and at once: a folder with a recipe is a run's, and the next start compares it.
    unfinished = folder / f".{RECIPE}.unfinished"
    write_recipe(recipe, unfinished)
    unfinished.replace(folder / RECIPE)
