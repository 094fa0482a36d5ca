"""Does an adapter belong to the base? Its shapes do not tell: a chat model has those of the model under it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from qwen_ds.disk.weights import FLOAT_DTYPES
from qwen_ds.errors import UserError
from qwen_ds.export.merge_plan import Plan
from qwen_ds.export.stream.blocks import row_ranges
from qwen_ds.export.stream.source import Source
from qwen_ds.model.adapter import CONFIG_NAME, Adapter

_HUB_CACHE = re.compile(r"models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/")


def hub_id(folder: Path | str) -> str | None:
    """The hub id of a folder in huggingface_hub's cache."""
    found = _HUB_CACHE.search(f"{Path(folder).absolute().as_posix()}/")
    return None if found is None else f"{found['owner']}/{found['name']}"


def base_name(folder: Path | str) -> str:
    """What a base is called: its hub id, or its folder's own name."""
    return hub_id(folder) or Path(folder).resolve().name


def doubts(base: Path, adapters: Sequence[Adapter]) -> list[str]:
    """What may be wrong and cannot be known, a line each: an adapter that says it was trained on a base of another name
    (folders can be renamed), and one without a configuration, whose scale is a guess."""
    ours, lines = base_name(base).rpartition("/")[2], []
    for adapter in adapters:
        said = adapter.config.get("base_model_name_or_path")
        name = (
            (hub_id(said) or said).replace("\\", "/").rstrip("/").rpartition("/")[2]
            if said
            else ours
        )
        if name.lower() != ours.lower():
            lines.append(
                f"{adapter.folder.name} says that it was trained on {name}; the base here is {ours}"
            )
        if not (adapter.folder / CONFIG_NAME).is_file():
            lines.append(
                f"{adapter.folder.name} has no {CONFIG_NAME}: lora_alpha is taken as {adapter.config['lora_alpha']:g};"
                f" write one if it was trained with another"
            )
    return lines


def check_copies(plan: Plan, source: Source, block_bytes: int) -> None:
    """Compare what adapters hold of their base, unchanged, with this base.

    Raises:
        UserError: the two differ. (Not asked where an adapter goes onto what another one changed.)
    """
    earlier: set[str] = set()
    in_sequence = plan.adapters.weights is None
    for adapter in plan.adapters.members:
        for name, key in adapter.copies.items():
            spec = plan.base.tensors[name]
            for rows in (
                ()
                if in_sequence and name in earlier
                else row_ranges(spec, 0, spec.num_rows, block_bytes)
            ):
                shape = (rows.last - rows.first, *spec.shape[1:])
                stored = source.read(rows).view(FLOAT_DTYPES[spec.dtype]).reshape(shape)
                copy = adapter.tensor(key, rows.first, rows.last)
                if not torch.equal(stored.to(copy.dtype), copy):
                    raise UserError(
                        f"{adapter.folder}: its copy of {name} differs from the base's in rows {rows.first} to"
                        f" {rows.last}; expected an adapter that was trained on {plan.base.folder}"
                    )
        earlier |= set(adapter.changed_tensors())
