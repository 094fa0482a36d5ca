"""The run folder: who may write into it, and what it says about the run."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qwen_ds import dist
from qwen_ds.config import Recipe, write_recipe
from qwen_ds.errors import UserError
from qwen_ds.model.folder import require_folder, write_json
from qwen_ds.train.lora import ParameterCount

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "datasets", "tiktoken", "safetensors", "numpy")
RECIPE = "recipe.yaml"


def claim(folder: Path) -> None:
    """Make the run folder ours; rank 0 only.

    Raises:
        UserError: it holds another run, or something else. Nothing in it is touched.
    """
    if folder.is_dir() and (strangers := sorted(p.name for p in folder.iterdir() if p.name not in ("logs",))):
        what = "another run" if RECIPE in strangers else f"{strangers[0]!r} and is no run folder"
        raise UserError(f"output_dir {folder} holds {what}; expected a new or empty folder; nothing was changed")
    require_folder(folder, make=True)


def write_resolved(
    folder: Path, recipe: Recipe, ds_json: dict[str, Any], device: torch.device, count: ParameterCount
) -> None:
    """recipe.yaml, ds_config.json, environment.json: running them again reproduces the run."""
    write_recipe(recipe, folder / RECIPE)
    write_json(folder / "ds_config.json", ds_json)
    write_json(
        folder / "environment.json",
        {
            "command": sys.argv,
            "ranks": dist.world_size(),
            "trainable_parameters": count.trainable,
            "total_parameters": count.total,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
            "threads_per_rank": torch.get_num_threads(),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: metadata.version(name) for name in PACKAGES},
        },
    )


def step_folder(folder: Path, step: int) -> Path:
    """checkpoints/step_000382"""
    return folder / "checkpoints" / f"step_{step:06d}"


def keep_newest(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    found = sorted((folder / "checkpoints").glob("step_*"))
    for old in found[: max(0, len(found) - keep)]:
        shutil.rmtree(old)
