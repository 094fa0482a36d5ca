"""A checkpoint folder as files: its shards, and what travels with them into a folder made from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ds.errors import UserError
from qwen_ds.export.safetensors_file import Header, TensorSpec, read_header
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.folder import INDEX_FILES, SINGLE_FILES, carry_over, read_json, write_json

SINGLE_NAME, INDEX_NAME = SINGLE_FILES[0], INDEX_FILES[0]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder's weights: the headers of its shards, and its index when it has one."""

    folder: Path
    shards: tuple[Header, ...]
    index_metadata: dict[str, Any] | None  # None: one file without an index

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for shard in self.shards for spec in shard.tensors}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.tensors.items()}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a safetensors checkpoint, one file or sharded.

    Raises:
        UserError: no safetensors, a missing or broken shard, an index that does not describe its shards.
    """
    index_path = folder / INDEX_NAME
    if (folder / SINGLE_NAME).is_file():
        return Checkpoint(folder, (read_header(folder / SINGLE_NAME),), None)
    if not index_path.is_file():
        pickles = any(folder.glob("pytorch_model*.bin"))
        came = "only pytorch_model*.bin" if pickles else "no weights"
        raise UserError(f"{folder}: {came}; expected {SINGLE_NAME} or {INDEX_NAME} with its shards")
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
        weight_map: dict[str, str] = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index_path}: no weight_map; expected the index of a sharded checkpoint") from error
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index_path}: names the shard {name!r}; expected a safetensors file in the same folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; expected all {len(names)} shards that {INDEX_NAME} names")
    shards = tuple(read_header(folder / name) for name in names)
    found = [(spec.name, shard.path.name) for shard in shards for spec in shard.tensors]
    if len(found) != len(weight_map) or dict(found) != weight_map:
        odd = sorted(set(found) ^ set(weight_map.items()))
        raise UserError(f"{index_path}: disagrees with its shards about {odd[0][0]}; expected an index made for them")
    return Checkpoint(folder, shards, index.get("metadata") or {})


def write_index(checkpoint: Checkpoint, tensors: dict[str, TensorSpec], output: Path) -> None:
    """Write the index of a sharded checkpoint whose `tensors` (name -> spec) went to shards of the same names."""
    weight_map = {spec.name: shard.path.name for shard in checkpoint.shards for spec in shard.tensors}
    metadata = {**(checkpoint.index_metadata or {}), "total_size": sum(spec.num_bytes for spec in tensors.values())}
    write_json(output / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def carry_files(base: Path, output: Path, torch_dtype: str | None) -> dict[str, str]:
    """`carry_over`; in config.json add `rms_norm_eps` and record `torch_dtype` (not None).

    Returns what was changed in the files, by file name.
    """
    edits: dict[str, list[str]] = {}
    for name in carry_over(base, output):
        if (output / name).read_bytes() != (base / name).read_bytes():
            edits[name] = ["auto_map removed: it names code that is not carried"]
    carried = read_json(output / "config.json")
    settings = with_rms_norm_eps(carried)
    if settings != carried:
        edits.setdefault("config.json", []).append("rms_norm_eps added for llama.cpp")
    if torch_dtype is not None:
        settings.update(torch_dtype=torch_dtype, bf16=False, fp16=False, fp32=False)
        settings.pop("dtype", None)
        edits.setdefault("config.json", []).append(f"torch_dtype set to {torch_dtype}")
    if settings != carried:
        write_json(output / "config.json", settings)
    return {name: "; ".join(what) for name, what in edits.items()}


def with_rms_norm_eps(settings: dict[str, Any]) -> dict[str, Any]:
    """config.json with Qwen's `layer_norm_epsilon` also under the name that llama.cpp looks for.

    It converts a Qwen without that key and then cannot load what it made.
    """
    return {**settings, "rms_norm_eps": QWenConfig.from_dict(settings).layer_norm_epsilon}


def file_facts(path: Path) -> dict[str, object]:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
