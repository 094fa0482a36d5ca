"""The weight files of a model folder: how they are found, opened, cut and indexed.

A folder holds one file, or several (shards) and an index that names the file of every tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from qwen_ds.disk.read import read_json
from qwen_ds.disk.weights import Header, TensorSpec, open_file
from qwen_ds.disk.write import write_json
from qwen_ds.errors import UserError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# In the order in which transformers looks for weights: what is checked is what is loaded.
_KINDS = ((SINGLE_NAME, INDEX_NAME), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
# transformers looks for these before all others, and then loads every *.safetensors of the folder.
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")

# Hubs and file systems take files of 4 GB, and a header is far below the 1 MiB left for it.
MAX_SHARD_BYTES = 4_000_000_000 - 2**20


def plan_shards(sizes: Mapping[str, int], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """Cut tensors (name -> bytes) into files of the usual names (name -> its tensors).

    Tensors keep their order, and each file is filled before the next one begins. A tensor larger
    than a file gets one of its own, since the format has no way to cut it. One file needs no index.
    """
    pattern = "model{suffix}.safetensors"
    split = split_state_dict_into_shards_factory(
        dict(sizes), get_storage_size=int, filename_pattern=pattern, max_shard_size=max_bytes
    )
    return split.filename_to_tensors


def write_index(
    folder: Path,
    members: Mapping[str, Iterable[str]],
    num_bytes: int,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Write the index of the shards `members` (file -> its tensors); returns its sha256 in hex.

    `num_bytes` is that of all tensors, `metadata` are further entries about the weights.
    """
    weight_map = {tensor: file for file, tensors in members.items() for tensor in tensors}
    about = {**(metadata or {}), "total_size": num_bytes}
    index = {"metadata": about, "weight_map": dict(sorted(weight_map.items()))}
    return write_json(folder / INDEX_NAME, index)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The names of a folder's weight files, and its index where it has one."""

    names: tuple[str, ...]
    index_name: str | None = None
    weight_map: Mapping[str, str] | None = None  # tensor -> file
    metadata: dict[str, Any] | None = None  # of the index; None where it has none


def find_weight_files(folder: Path, allow_pickle: bool = True) -> WeightFiles | None:
    """The weight files of a folder, all of which are there; None where it has none.

    They are those that transformers would load. Raises UserError if an index is broken, or names a
    file that is missing, of another kind or outside the folder.
    """
    # By its names, so that a link to nothing counts as a file that cannot be read, not as no file.
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; expected a folder of weights") from None
    if odd := sorted(name for name in names if _DISTRIBUTED.fullmatch(name)):
        raise UserError(
            f"{folder}: {odd[0]} is of a checkpoint that torch saved rank by rank; expected"
            f" {SINGLE_NAME} or {INDEX_NAME} with its shards"
        )
    for single, index_name in _KINDS if allow_pickle else _KINDS[:1]:
        if single in names:
            return WeightFiles((single,))
        if index_name in names:
            return _read_index(folder, index_name, Path(single).suffix, names)
    return None


def has_weights(folder: Path) -> bool:
    """Whether a folder holds any file of weights; an index alone is none."""
    return any(any(folder.glob(kind)) for kind in ("*.safetensors", "pytorch_model*.bin"))


def _read_index(folder: Path, index_name: str, suffix: str, there: set[str]) -> WeightFiles:
    path = folder / index_name
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: no weight_map; expected the file of every tensor")
    files = weight_map.values()
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise UserError(
                f"{path}: names the shard {str(name)[:200]!r}; expected a {suffix} file in the same"
                " folder"
            )
    names = tuple(sorted(set(files)))
    if missing := [name for name in names if name not in there]:
        raise UserError(
            f"{folder}: {missing[0][:200]} is missing ({len(missing)} of {len(names)} weight files"
            f" are); expected every file that {index_name} names"
        )
    metadata = index.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise UserError(f"{path}: metadata is {str(metadata)[:100]!r}; expected an object")
    return WeightFiles(names, index_name, weight_map, metadata)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A folder's weights as they are stored: the headers of its files."""

    folder: Path
    shards: tuple[Header, ...]
    index_metadata: dict[str, Any] | None = None
    index_name: str | None = None  # None: one file without an index

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for shard in self.shards for spec in shard.tensors}

    @property
    def are_pickles(self) -> bool:
        return any(shard.pickled is not None for shard in self.shards)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.tensors.items()}


def open_stored(folder: Path, allow_pickle: bool = False) -> StoredWeights:
    """Read the headers of a folder's weights, in one file or in shards.

    Raises UserError for no weights of a kind that may be read, a missing or broken file, and an
    index that disagrees with its files.
    """
    files = find_weight_files(folder, allow_pickle)
    # With their index: pickles that are not allowed are not fetched.
    if files is None and any(folder.glob("pytorch_model*.bin*")):
        raise only_pickles(folder)
    if files is None:
        hint = "" if allow_pickle else " (--allow_pickle true reads pickles, too)"
        raise UserError(
            f"{folder}: no weights; expected {SINGLE_NAME} or {INDEX_NAME} with its shards{hint}"
        )
    shards = tuple(open_file(folder / name) for name in files.names)
    if files.weight_map is not None:
        found = {(spec.name, shard.path.name) for shard in shards for spec in shard.tensors}
        if odd := sorted(found ^ set(files.weight_map.items())):
            raise UserError(
                f"{folder / str(files.index_name)}: disagrees with its shards about"
                f" {odd[0][0][:200]}; expected an index made for them"
            )
    return StoredWeights(folder, shards, files.metadata, files.index_name)


def only_pickles(folder: Path) -> UserError:
    """The error of a command that reads pickles only where it is told to."""
    return UserError(
        f"{folder}: only pytorch_model*.bin, which are pickles; expected {SINGLE_NAME} or"
        f" {INDEX_NAME} with its shards (--allow_pickle true reads pickles that hold nothing but"
        " tensors)"
    )
