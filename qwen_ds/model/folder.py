"""The gate for models: finds a checkpoint folder, or fetches a hub id into one, and checks it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from qwen_ds.disk.read import read_json
from qwen_ds.disk.shards import check_weight_files
from qwen_ds.errors import UserError
from qwen_ds.model.family import FAMILIES, QWEN
from qwen_ds.model.tokenizer import VOCABULARY_FILE

# Without *.py: no code of a repository ever reaches this machine.
_LEGAL = ["*LICENSE*", "*LICENCE*", "*NOTICE*", "*COPYING*", "USE_POLICY*"]
_FETCHED = ["*.json", "*.tiktoken", *_LEGAL]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SIZE_BY_WIDTH = {2048: "1_8B", 4096: "7B", 5120: "14B", 8192: "72B"}


def find_model(
    path_or_hub_id: str | Path, weights: bool = True, model_type: str = QWEN.model_type
) -> Path:
    """Find the checkpoint folder of a path or of a hub id (`Qwen/Qwen-7B-Chat`), and check it.

    What exists on disk is never looked up on the hub. Fetching is huggingface_hub's: its cache,
    mirror (HF_ENDPOINT) and offline mode (HF_HUB_OFFLINE) apply. UserError if the folder cannot be
    found, fetched or used.

    Args:
        weights: if false, none are fetched or expected.
        model_type: "qwen2" for a folder that is only to be converted.
    """
    check_place(path_or_hub_id, weights, model_type)
    path = Path(path_or_hub_id).expanduser()
    if not path.exists():
        path = _fetch(str(path_or_hub_id), weights)
        check_folder(path, weights, model_type)
    return path


def check_place(
    path_or_hub_id: str | Path, weights: bool = True, model_type: str = QWEN.model_type
) -> None:
    """Check what can be known of a model's place without the hub; arguments as for `find_model`.
    UserError: a folder that cannot be used, or neither a folder nor the form of a hub id."""
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        check_folder(path, weights, model_type)
    elif not _HUB_ID.fullmatch(str(path_or_hub_id)):
        raise UserError(
            f"{path_or_hub_id}: no such folder; expected a checkpoint folder or a hub id like"
            " Qwen/Qwen-7B-Chat"
        )


def _fetch(hub_id: str, weights: bool) -> Path:
    def download(*weight_files: str) -> Path:
        return Path(snapshot_download(hub_id, allow_patterns=[*_FETCHED, *weight_files]))

    try:
        if not weights:
            return download()
        folder = download("*.safetensors")
        # Pickles only where there is nothing else, as in the releases of August 2023.
        whole = any(folder.glob("*.safetensors"))
        return folder if whole else download("pytorch_model*.bin")
    # An error of the hub, of HTTP or of the disk: the user's way out is the same.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The first two lines say what happened and where; the library's advice follows.
        reason = " ".join(lines[:2])[:300] or type(error).__name__
        raise UserError(
            f"{hub_id}: no such folder, and fetching it from the hub failed: {reason}"
        ) from None


def check_folder(folder: Path, weights: bool = True, model_type: str = QWEN.model_type) -> None:
    """Check that a folder holds a Qwen that can be loaded; reads headers only, no tensors.

    UserError unless config.json has this model_type and is that of a text-only, unquantised model,
    the vocabulary fits the embedding (the converter checks a Qwen2's) and, with `weights`, every
    weight file is whole.
    """
    if not folder.is_dir():
        came = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {came}; expected a checkpoint")
    config = _read_config(folder, model_type)
    if model_type in FAMILIES:
        n_vocab = FAMILIES[model_type].load_encoding(folder).n_vocab
        # The first release had `vocab_size` for the tokenizer and `padded_vocab_size` for the rows.
        n_rows = config.get("padded_vocab_size") or config.get("vocab_size")
        if not isinstance(n_rows, int) or n_rows < n_vocab:
            raise UserError(
                f"{folder}: {VOCABULARY_FILE} has {n_vocab} tokens but config.json says vocab_size"
                f" {n_rows}; expected an embedding row for every token"
            )
    if weights:
        check_weight_files(folder)


def _read_config(folder: Path, expected_type: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        came = "no config.json; expected a checkpoint folder"
        if (folder / "adapter_config.json").is_file():
            came = "an adapter, not a model; expected the folder of its base here"
        raise UserError(f"{folder}: {came}")
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type != expected_type:
        native = expected_type == QWEN.model_type
        which = "(Qwen 1, not Qwen1.5 or later)" if native else "(--from qwen2)"
        raise UserError(f"{path}: model_type is {model_type!r}; expected {expected_type!r} {which}")
    if config.get("quantization_config") is not None or (folder / "quantize_config.json").is_file():
        use = _unquantised(folder, config)
        raise UserError(f"{folder}: quantised weights (Int4/Int8); expected bf16: use {use}")
    for part in ("visual", "audio"):
        if part in config:
            came = f"a Qwen with a part for {part} input"
            raise UserError(f"{path}: {came}; expected a text-only Qwen")
    return config


def _unquantised(folder: Path, config: dict[str, Any]) -> str:
    """The hub id of the bf16 model that a quantised one was made from."""
    for name in (str(config.get("_name_or_path") or ""), *reversed(folder.parts)):
        found = re.search(r"(Qwen-[\w.]+?(-Chat)?)-Int[48]", name)
        if found:
            return f"Qwen/{found[1]}"
    size = _SIZE_BY_WIDTH.get(config.get("hidden_size") or config.get("n_embd") or 0)
    return f"Qwen/Qwen-{size}-Chat" if size else "the model it was made from"
