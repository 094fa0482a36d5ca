"""The one gate for model folders: found or fetched, inspected once, described for every command."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download

from qwen_ds.disk.read import read_json
from qwen_ds.disk.shards import StoredWeights, has_weights, open_stored
from qwen_ds.disk.weights import FLOAT_DTYPES
from qwen_ds.errors import UserError
from qwen_ds.model.config_check import (
    as_meant,
    check_generation,
    checked_config,
    checked_qwen2,
    refuse_ways_around,
)
from qwen_ds.model.family import FAMILIES, QWEN, Family, ModelConfig
from qwen_ds.model.shapes import check_shapes, state_shapes
from qwen_ds.model.tokenizer import VOCABULARY_FILE, Encoding

# Without *.py: no code of a repository ever reaches this machine.
_LEGAL = ["*LICENSE*", "*LICENCE*", "*NOTICE*", "*COPYING*", "USE_POLICY*"]
_FETCHED = ["*.json", "*.tiktoken", *_LEGAL]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SIZE_BY_WIDTH = {2048: "1_8B", 4096: "7B", 5120: "14B", 8192: "72B"}
_GENERATION, _TOKENIZER = "generation_config.json", "tokenizer_config.json"

WhichWeights = bool | Literal["if there"]
"""Whether a folder must have weights and they are looked at. "if there": they are looked at if the
folder has any; none are fetched."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model folder of any family, whose files do not lead out of it."""

    path: Path
    settings: Mapping[str, Any]  # config.json
    weights: StoredWeights | None
    """Their headers; None where weights were not asked for."""

    @property
    def stored(self) -> StoredWeights:
        """The headers of the weights, in a folder that was inspected with them."""
        assert self.weights is not None, "inspected without its weights"
        return self.weights


@dataclass(frozen=True, slots=True)
class ModelFolder(StoredModel):
    """A Qwen's folder as it was inspected: what training, prediction, merge and planner go by."""

    family: Family
    config: ModelConfig
    generation: Mapping[str, Any]  # generation_config.json; empty if there is none
    encoding: Encoding


def find_model(
    path_or_hub_id: str | Path, weights: WhichWeights = True, allow_pickle: bool = True
) -> ModelFolder:
    """Find and inspect the checkpoint folder of a path or of a hub id (`Qwen/Qwen-7B-Chat`).

    What exists on disk is never looked up on the hub. Fetching is huggingface_hub's: its cache,
    mirror (HF_ENDPOINT) and offline mode (HF_HUB_OFFLINE) apply. UserError if the folder cannot be
    found, fetched or used. Without `allow_pickle` no pickle is fetched or opened.
    """
    if (folder := _on_disk(path_or_hub_id)) is not None:
        return inspect_folder(folder, weights, allow_pickle)
    whole = weights is True  # of a cached model some weights may not have been fetched yet
    return inspect_folder(_fetch(str(path_or_hub_id), whole, allow_pickle), whole, allow_pickle)


def find_qwen2(path_or_hub_id: str | Path, allow_pickle: bool = True) -> StoredModel:
    """Find a Qwen2 that is only to be converted, as `find_model` does. The converter checks what
    its configuration and tokenizer say."""
    folder = _on_disk(path_or_hub_id) or _fetch(str(path_or_hub_id), True, allow_pickle)
    settings = _read_config(folder, "qwen2")
    checked_qwen2(settings, folder / "config.json")
    _read_small_files(folder)
    stored = open_stored(folder, allow_pickle)
    _check_stored(stored, stored.tensors)
    return StoredModel(folder, settings, stored)


def check_place(path_or_hub_id: str | Path) -> None:
    """Check what can be known of a model's place without the hub and without weights. UserError: a
    folder that cannot be used, or neither a folder nor the form of a hub id."""
    if (folder := _on_disk(path_or_hub_id)) is not None:
        inspect_folder(folder, weights=False)


def _on_disk(path_or_hub_id: str | Path) -> Path | None:
    """The place on disk, whatever is there, or None for a hub id; UserError for neither."""
    # Not Path's own methods, which raise for a user or a path that cannot be. A link to nothing is
    # on the disk, too: its name must not be looked up on the hub.
    path = os.path.expanduser(path_or_hub_id)
    if os.path.lexists(path):
        return Path(path)
    if _HUB_ID.fullmatch(str(path_or_hub_id)):
        return None
    raise UserError(
        f"{path_or_hub_id}: no such folder; expected a checkpoint folder or a hub id like"
        " Qwen/Qwen-7B-Chat"
    )


def _fetch(hub_id: str, weights: bool, allow_pickle: bool) -> Path:
    def download(*weight_files: str) -> Path:
        return Path(snapshot_download(hub_id, allow_patterns=[*_FETCHED, *weight_files]))

    try:
        if not weights:
            return download()
        folder = download("*.safetensors")
        # Pickles only where there is nothing else, as in the releases of August 2023.
        whole = any(folder.glob("*.safetensors"))
        return folder if whole or not allow_pickle else download("pytorch_model*.bin")
    # An error of the hub, of HTTP or of the disk: the user's way out is the same.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The first two lines say what happened and where; the library's advice follows.
        reason = " ".join(lines[:2])[:300] or type(error).__name__
        raise UserError(
            f"{hub_id}: no such folder, and fetching it from the hub failed: {reason}"
        ) from None


def inspect_folder(
    folder: Path, weights: WhichWeights = True, allow_pickle: bool = True
) -> ModelFolder:
    """Read a folder's settings, vocabulary and, with `weights`, the headers of its weight files,
    and check that they make one Qwen that can be loaded; no tensor is read.

    UserError unless it is a text-only, unquantised model of ours, every number is in its range,
    nothing leads out of the folder, and the weight files that transformers would load hold the very
    tensors that config.json describes.
    """
    settings = _read_config(folder, QWEN.model_type)
    family = FAMILIES[settings["model_type"]]
    config = checked_config(settings, folder / "config.json", family.config_class)
    generation = _read_small_files(folder)
    encoding = family.load_encoding(folder)
    # The first release had `vocab_size` for the tokenizer and `padded_vocab_size` for the rows.
    n_rows = settings.get("padded_vocab_size") or settings.get("vocab_size")
    if n_rows is None or n_rows < encoding.n_vocab:
        raise UserError(
            f"{folder}: {VOCABULARY_FILE} has {encoding.n_vocab} tokens but config.json says"
            f" vocab_size {n_rows}; expected an embedding row for every token"
        )
    stored = None
    if weights is True or (weights and has_weights(folder)):
        stored = open_stored(folder, allow_pickle)
        try:
            used = check_shapes(stored.shapes, state_shapes(config))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        _check_stored(stored, used)
    return ModelFolder(folder, settings, stored, family, config, generation, encoding)


def _read_small_files(folder: Path) -> dict[str, Any]:
    """generation_config.json, checked; empty if there is none."""
    names = _names(folder)
    generation = read_json(folder / _GENERATION) if _GENERATION in names else {}
    check_generation(generation, folder / _GENERATION)
    if _TOKENIZER in names:  # ours reads nothing of it, but whoever gets the output does
        read_json(folder / _TOKENIZER)
    return generation


def _check_stored(stored: StoredWeights, used: Iterable[str]) -> None:
    """Check that transformers can load the weights, and that the tensors `used` are floats."""
    if stored.index_name is not None and stored.index_metadata is None:
        raise UserError(
            f"{stored.folder / stored.index_name}: no metadata; expected an object of that name"
            " beside weight_map, without which transformers cannot load the weights"
        )
    tensors = stored.tensors
    for name in used:
        if (dtype := tensors[name].dtype) not in FLOAT_DTYPES:
            raise UserError(
                f"{stored.folder}: {name} is stored as {dtype}; expected {', '.join(FLOAT_DTYPES)}"
            )


def _names(folder: Path) -> set[str]:
    """The names in a folder, those of links to nothing, too."""
    if not os.path.isdir(folder):
        came = "not a folder" if os.path.lexists(folder) else "no such folder"
        raise UserError(f"{folder}: {came}; expected a checkpoint")
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; expected a checkpoint") from None


def _read_config(folder: Path, expected_type: str) -> dict[str, Any]:
    """config.json, of a folder and a model that could be ours. UserError: anything else."""
    path, names = folder / "config.json", _names(folder)
    is_adapter = "adapter_config.json" in names
    if path.name not in names:
        came = "no config.json; expected a checkpoint folder"
        if is_adapter:
            came = "an adapter, not a model; expected the folder of its base here"
        raise UserError(f"{folder}: {came}")
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type != expected_type:
        native = expected_type == QWEN.model_type
        which = "(Qwen 1, not Qwen1.5 or later)" if native else "(--from qwen2)"
        came = f"model_type is {str(model_type)[:100]!r}" if model_type else "model_type is None"
        raise UserError(f"{path}: {came}; expected {expected_type!r} {which}")
    meant = as_meant(config)
    if "quantization_config" in meant or "quantize_config.json" in names:
        use = _unquantised(folder, config)
        raise UserError(f"{folder}: quantised weights (Int4/Int8); expected bf16: use {use}")
    for part in ("visual", "audio"):
        if part in meant:
            came = f"a Qwen with a part for {part} input"
            raise UserError(f"{path}: {came}; expected a text-only Qwen")
    if is_adapter:  # transformers would put it on the model, unasked
        raise UserError(
            f"{folder}: adapter_config.json beside config.json: an adapter in the folder of a base;"
            " expected them in folders of their own (--adapter, or lora.init_from)"
        )
    refuse_ways_around(config, path)
    return config


def _unquantised(folder: Path, config: dict[str, Any]) -> str:
    """The hub id of the bf16 model that a quantised one was made from."""
    for name in (str(config.get("_name_or_path") or ""), *reversed(folder.parts)):
        found = re.search(r"(Qwen-[\w.]+?(-Chat)?)-Int[48]", name)
        if found:
            return f"Qwen/{found[1]}"
    width = config.get("hidden_size") or config.get("n_embd")
    size = _SIZE_BY_WIDTH.get(width) if isinstance(width, int) else None
    return f"Qwen/Qwen-{size}-Chat" if size else "the model it was made from"
