"""A checkpoint folder as files: its shards, and what travels with them into a folder made from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ds.disk.read import read_json
from qwen_ds.disk.weights import DTYPE_NAMES, TensorSpec, file_sha256, read_pickle
from qwen_ds.disk.write import write_json
from qwen_ds.errors import UserError
from qwen_ds.export.stream.blocks import Header, read_header
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.folder import INDEX_FILES, SINGLE_FILES, carry_over

SINGLE_NAME, INDEX_NAME = SINGLE_FILES[0], INDEX_FILES[0]
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder's weights: the headers of its shards, and its index when it has one."""

    folder: Path
    shards: tuple[Header, ...]
    index_metadata: dict[str, Any] | None  # None: one file without an index
    index_name: str | None = None

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for shard in self.shards for spec in shard.tensors}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.tensors.items()}


def open_checkpoint(folder: Path, allow_pickle: bool = False) -> Checkpoint:
    """Read the headers of a checkpoint, one file or sharded; of pickles only where they are allowed.

    Raises:
        UserError: no weights of a kind that may be read, a missing or broken file, an index that does not describe its
            files.
    """
    kinds = [(single, index) for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True)]
    for single, index in kinds if allow_pickle else kinds[:1]:
        if (folder / single).is_file():
            return Checkpoint(folder, (_open_file(folder / single),), None)
        if (folder / index).is_file():
            return _open_sharded(folder, index)
    pickles = any(folder.glob("pytorch_model*.bin"))
    came = "only pytorch_model*.bin, which are pickles" if pickles else "no weights"
    advice = " (--allow_pickle true reads pickles that hold nothing but tensors)" if pickles else ""
    raise UserError(
        f"{folder}: {came}; expected {SINGLE_NAME} or {INDEX_NAME} with its shards{advice}"
    )


def _open_sharded(folder: Path, index_name: str) -> Checkpoint:
    index_path, suffix = (
        folder / index_name,
        Path(SINGLE_FILES[INDEX_FILES.index(index_name)]).suffix,
    )
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
        weight_map: dict[str, str] = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{index_path}: no weight_map; expected the index of a sharded checkpoint"
        ) from error
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(suffix):
            raise UserError(
                f"{index_path}: names the shard {name!r}; expected a {suffix} file in the same folder"
            )
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: missing; expected all {len(names)} shards that {index_name} names"
            )
    shards = tuple(_open_file(folder / name) for name in names)
    found = [(spec.name, shard.path.name) for shard in shards for spec in shard.tensors]
    if len(found) != len(weight_map) or dict(found) != weight_map:
        odd = sorted(set(found) ^ set(weight_map.items()))
        raise UserError(
            f"{index_path}: disagrees with its shards about {odd[0][0]}; expected an index made for them"
        )
    return Checkpoint(folder, shards, index.get("metadata") or {}, index_name)


def _open_file(path: Path) -> Header:
    return read_header(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_pickle(path: Path) -> Header:
    tensors = read_pickle(path, mmap=True)
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in DTYPE_NAMES]
    if odd:
        raise UserError(
            f"{path}: {odd[0]} has dtype {tensors[odd[0]].dtype}; expected one that safetensors has"
        )
    specs = [
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    return Header(path, tuple(specs), {"format": "pt"}, 0, tensors)


def carry_files(
    base: Path, output: Path, torch_dtype: str | None, merges_adapter: bool
) -> dict[str, str]:
    """`carry_over`; in config.json add `rms_norm_eps` and record `torch_dtype` (not None).

    An adapter is trained in ChatML: a base model that one is merged into answers as a chat model does.

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
    if merges_adapter and (output / GENERATION_CONFIG).is_file():
        generation = read_json(output / GENERATION_CONFIG)
        if generation.get("chat_format") == "raw":
            write_json(output / GENERATION_CONFIG, {**generation, "chat_format": "chatml"})
            edits.setdefault(GENERATION_CONFIG, []).append("chat_format set to chatml")
    return {name: "; ".join(what) for name, what in edits.items()}


def with_rms_norm_eps(settings: dict[str, Any]) -> dict[str, Any]:
    """config.json with Qwen's `layer_norm_epsilon` also under the name that llama.cpp looks for.

    It converts a Qwen without that key and then cannot load what it made.
    """
    return {**settings, "rms_norm_eps": QWenConfig.from_dict(settings).layer_norm_epsilon}


def file_facts(path: Path) -> dict[str, object]:
    """Size and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
