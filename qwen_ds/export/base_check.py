"""Checks that an adapter belongs to the base.

Shapes cannot tell: a chat model has those of the model that it was trained from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from qwen_ds.disk.weights import FLOAT_DTYPES
from qwen_ds.errors import UserError
from qwen_ds.export.merge_plan import MergePlan
from qwen_ds.export.stream.blocks import row_ranges
from qwen_ds.export.stream.source import Source
from qwen_ds.model.adapter import CONFIG_NAME, Adapter

_HUB_CACHE = re.compile(r"models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/")


def hub_id(folder: Path | str) -> str | None:
    """The hub id of a folder in huggingface_hub's cache."""
    found = _HUB_CACHE.search(f"{Path(folder).absolute().as_posix()}/")
    return None if found is None else f"{found['owner']}/{found['name']}"


def base_name(folder: Path | str) -> str:
    """The name of a base: its hub id, or its folder's own name."""
    return hub_id(folder) or Path(folder).resolve().name


def doubts(base: Path, adapters: Sequence[Adapter]) -> list[str]:
    """Possible mistakes, a line each: an adapter names another base, or its scale is a guess.

    Neither is certain to be one: a folder may have been renamed, and a guess may be right.
    """
    ours, lines = base_name(base).rpartition("/")[2], []
    for adapter in adapters:
        said = str(adapter.config.get("base_model_name_or_path") or ours)
        name = (hub_id(said) or said).replace("\\", "/").rstrip("/").rpartition("/")[2]
        if name.lower() != ours.lower():
            lines.append(
                f"{adapter.folder.name} says that it was trained on {name}; the base here is {ours}"
            )
        if not (adapter.folder / CONFIG_NAME).is_file():
            lines.append(
                f"{adapter.folder.name} has no {CONFIG_NAME}: lora_alpha is taken as"
                f" {adapter.config['lora_alpha']:g}; write one if it was trained with another"
            )
    return lines


def check_copies(plan: MergePlan, source: Source, block_bytes: int) -> None:
    """Raise UserError where an adapter's unchanged copy of a tensor is not this base's.

    Except where an adapter is folded onto what another one changed.
    """
    earlier: set[str] = set()
    for adapter in plan.adapters.members:
        for name, key in adapter.copies.items():
            if plan.adapters.weights is None and name in earlier:
                continue
            spec = plan.base.tensors[name]
            for rows in row_ranges(spec, 0, spec.num_rows, block_bytes):
                shape = (rows.last - rows.first, *spec.shape[1:])
                stored = source.read(rows).view(FLOAT_DTYPES[spec.dtype]).reshape(shape)
                copy = adapter.tensor(key, rows.first, rows.last)
                if not torch.equal(stored.to(copy.dtype), copy):
                    raise UserError(
                        f"{adapter.folder}: its copy of {name} differs from the base's in rows"
                        f" {rows.first} to {rows.last}; expected an adapter that was trained on"
                        f" {plan.base.folder}"
                    )
        earlier |= set(adapter.changed_tensors())
