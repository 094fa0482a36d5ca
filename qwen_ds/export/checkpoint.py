"""A checkpoint folder as files: its shards, and what travels with them into a folder made from it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ds.errors import UserError
from qwen_ds.export.safetensors_file import Header, TensorSpec, read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# Settings, tokenizer and legal texts. Code (*.py, *.cpp) is not carried: nothing here needs it, and a folder that we
# wrote should run none. A model card describes the base, not what was made of it.
_CARRIED = re.compile(
    r"(config|configuration|generation_config|tokenizer_config|special_tokens_map|added_tokens|tokenizer|vocab)\.json"
    r"|merges\.txt|.*\.tiktoken|chat_template\.(jinja|json)"
    r"|(.*[ _.-])?(licen[cs]e|notice|copying|copyright)([ _.-].*)?"
    r"|use[ _-]?policy.*",
    re.IGNORECASE,
)
_NEVER = re.compile(r".*\.(py|pyc|so|cpp|cu|bin|pt|pth|pkl|safetensors)", re.IGNORECASE)


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
    """Copy settings, tokenizer and legal texts; returns what was changed in them, by file name.

    Verbatim, but for two things: `auto_map` goes, since it names Python files that are not carried (engines with a
    Qwen of their own go by model_type and architectures, which stay); and `torch_dtype` (not None) is recorded.
    """
    edits: dict[str, str] = {}
    for source in sorted(base.iterdir()):
        if not source.is_file() or not _CARRIED.fullmatch(source.name) or _NEVER.fullmatch(source.name):
            continue
        target = output / source.name
        shutil.copyfile(source, target)
        target.chmod(0o644)
        if source.name not in ("config.json", "tokenizer_config.json"):
            continue
        settings = json.loads(source.read_text(encoding="utf-8"))
        done = []
        if settings.pop("auto_map", None) is not None:
            done.append("auto_map removed: it names code that is not carried")
        if source.name == "config.json" and torch_dtype is not None:
            settings.update(torch_dtype=torch_dtype, bf16=False, fp16=False, fp32=False)
            settings.pop("dtype", None)
            done.append(f"torch_dtype set to {torch_dtype}")
        if done:
            write_json(target, settings)
            edits[source.name] = "; ".join(done)
    return edits


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path.chmod(0o644)


def file_facts(path: Path) -> dict[str, object]:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
