"""Where a model comes from: a checkpoint folder, or a hub id fetched into one; checked before anything is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from qwen_ds.disk.read import read_json
from qwen_ds.disk.write import write_json
from qwen_ds.errors import UserError
from qwen_ds.model.tokenizer import VOCABULARY_FILE, load_encoding

# What is fetched from a hub. There is no *.py among them: no code of a repository ever reaches this machine.
FILES = ["*.json", "*.tiktoken", "*LICENSE*", "*LICENCE*", "*NOTICE*", "*COPYING*", "USE_POLICY*"]
SAFETENSORS = ["*.safetensors"]
# Read with weights_only, and fetched only where a repository has no safetensors (the releases of August 2023).
PICKLES = ["pytorch_model*.bin"]

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

# What a folder made from a model takes over from it: settings, tokenizer and legal texts. Code (*.py, *.cpp) is not
# carried: nothing here needs it, and a folder that we wrote should run none. A model card describes the base, not what
# was made of it.
_LEGAL = r"(.*[ _.-])?(licen[cs]e|notice|copying|copyright)([ _.-].*)?|use[ _-]?policy.*"
_CARRIED = re.compile(
    r"(config|configuration|generation_config|tokenizer_config|special_tokens_map|added_tokens|tokenizer|vocab)\.json"
    rf"|merges\.txt|.*\.tiktoken|chat_template\.(jinja|json)|{_LEGAL}",
    re.IGNORECASE,
)
_NEVER = re.compile(r".*\.(py|pyc|so|cpp|cu|bin|pt|pth|pkl|safetensors)", re.IGNORECASE)
_LEGAL_TEXT = re.compile(_LEGAL, re.IGNORECASE)
_NAMES_CODE = ("config.json", "tokenizer_config.json")  # in auto_map

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LFS_POINTER = b"version https://git-lfs"
CHAT_MODELS = {
    2048: "Qwen-1_8B-Chat",
    4096: "Qwen-7B-Chat",
    5120: "Qwen-14B-Chat",
    8192: "Qwen-72B-Chat",
}  # by hidden


def find_model(path_or_hub_id: str | Path, weights: bool = True, model_type: str = "qwen") -> Path:
    """The checked checkpoint folder of a path or of a hub id (`Qwen/Qwen-7B-Chat`).

    What exists on disk is never looked up on the hub. Fetching is huggingface_hub's: its cache, mirror (HF_ENDPOINT)
    and offline mode (HF_HUB_OFFLINE) apply. Without `weights` none are fetched or expected. `model_type` is "qwen2" for
    a folder that is only to be converted. UserError, one line, for whatever makes the folder unusable.
    """
    path = Path(path_or_hub_id).expanduser()
    if not path.exists():
        path = _fetch(str(path_or_hub_id), weights)
    check_folder(path, weights, model_type)
    return path


def _fetch(hub_id: str, weights: bool) -> Path:
    if not HUB_ID.fullmatch(hub_id):
        raise UserError(
            f"{hub_id}: no such folder; expected a checkpoint folder or a hub id like Qwen/Qwen-7B-Chat"
        )
    try:
        folder = Path(
            snapshot_download(hub_id, allow_patterns=FILES + (SAFETENSORS if weights else []))
        )
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=FILES + PICKLES))
    except (
        Exception
    ) as error:  # of the hub, of HTTP, of the disk: whichever it is, the user's way out is the same
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
            type(error).__name__
        ]
        reason = " ".join(lines[:2])[
            :300
        ]  # what happened and where; below that the library gives advice
        raise UserError(
            f"{hub_id}: no such folder, and fetching it from the hub failed: {reason}"
        ) from None
    return folder


def check_folder(folder: Path, weights: bool = True, model_type: str = "qwen") -> None:
    """Raise UserError, in one line, unless the folder holds a Qwen that can be loaded.

    That is: config.json with this model_type, not quantised, text only; a vocabulary that fits the embedding (of a
    Qwen2 its converter checks that); and, with `weights`, every file of them whole. Reads headers only, no tensors.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; expected a checkpoint"
        )
    config = _read_config(folder, model_type)
    if model_type == "qwen":
        _check_vocabulary(folder, config)
    if weights:
        _check_weights(folder)


def _check_vocabulary(folder: Path, config: dict[str, Any]) -> None:
    n_vocab = load_encoding(folder).n_vocab
    # The first release had `vocab_size` for the tokenizer and `padded_vocab_size` for the rows of the embedding.
    n_rows = config.get("padded_vocab_size") or config.get("vocab_size")
    if not isinstance(n_rows, int) or n_rows < n_vocab:
        raise UserError(
            f"{folder}: {VOCABULARY_FILE} has {n_vocab} tokens but config.json says vocab_size {n_rows}; "
            "expected an embedding row for every token"
        )


def _read_config(folder: Path, expected_type: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder}: an adapter, not a model; expected the folder of its base here"
            )
        raise UserError(f"{folder}: no config.json; expected a checkpoint folder")
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type != expected_type:
        which = "(Qwen 1, not Qwen1.5 or later)" if expected_type == "qwen" else "(--from qwen2)"
        raise UserError(f"{path}: model_type is {model_type!r}; expected {expected_type!r} {which}")
    if config.get("quantization_config") is not None or (folder / "quantize_config.json").is_file():
        raise UserError(
            f"{folder}: quantised weights (Int4/Int8); expected bf16: use {_unquantised(folder, config)}"
        )
    for part in ("visual", "audio"):
        if part in config:
            raise UserError(
                f"{path}: a Qwen with a part for {part} input; expected a text-only Qwen"
            )
    return config


def _unquantised(folder: Path, config: dict[str, Any]) -> str:
    """The hub id of the bf16 model that a quantised one was made from."""
    for name in (str(config.get("_name_or_path") or ""), *reversed(folder.parts)):
        found = re.search(r"(Qwen-[\w.]+?(-Chat)?)-Int[48]", name)
        if found:
            return f"Qwen/{found[1]}"
    hidden = config.get("hidden_size") or config.get("n_embd")
    return f"Qwen/{CHAT_MODELS[hidden]}" if hidden in CHAT_MODELS else "the model it was made from"


def _check_weights(folder: Path) -> None:
    """Every weight file is there and whole; an index says which they are, unless there is a single file.

    The order is that in which transformers looks for weights: what is checked here is what is loaded.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).is_file():
            names = [single]
        elif (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(
                    f"{folder / index}: no weight_map; expected the file of every tensor"
                )
            names = sorted({str(name) for name in weight_map.values()})
        else:
            continue
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {missing[0]} is missing ({len(missing)} of {len(names)} weight files are); "
                f"expected every file named in {index}"
            )
        for name in names:
            _check_file(folder / name)
        return
    raise UserError(
        f"{folder}: no weights; expected {' or '.join((SINGLE_FILES[0], INDEX_FILES[0]))}"
    )


def _check_file(path: Path) -> None:
    """A safetensors file ends where its header says: a download that broke off is found before anything is loaded."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == LFS_POINTER[:8]:
            raise UserError(
                f"{path}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
            )
        if path.suffix != ".safetensors":
            return
        n_header = int.from_bytes(start, "little")
        try:
            header = json.loads(file.read(n_header)) if len(start) == 8 and n_header < size else {}
            end = max(
                tensor["data_offsets"][1]
                for name, tensor in header.items()
                if name != "__metadata__"
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(
                f"{path}: not a whole safetensors file ({size} bytes); expected weights"
            ) from None
    expected = 8 + n_header + end
    if size != expected:
        raise UserError(
            f"{path}: {size} bytes; expected {expected}: the file is cut off or damaged"
        )


def carry_over(base: Path, target: Path, legal_only: bool = False) -> list[str]:
    """Copy what travels with a model, but for its weights, from folder `base` to folder `target`.

    Verbatim and readable by everybody, but for `auto_map` in the settings, which goes: it names Python files that are
    not carried (engines with a Qwen of their own go by model_type and architectures, which stay). With `legal_only` the
    legal texts alone: for a folder in another format, which has settings and a tokenizer of its own.

    Returns:
        The names of the files written.
    """
    carried = _LEGAL_TEXT if legal_only else _CARRIED
    names = sorted(
        path.name for path in base.iterdir() if path.is_file() and carried.fullmatch(path.name)
    )
    names = [name for name in names if not _NEVER.fullmatch(name)]
    for name in names:
        settings = read_json(base / name) if name in _NAMES_CODE else {}
        if "auto_map" in settings:
            del settings["auto_map"]
            write_json(target / name, settings)
        else:
            shutil.copyfile(base / name, target / name)
            (target / name).chmod(0o644)
    return names


def legal_texts(folder: Path) -> list[str]:
    """Names of the files in `folder` that are licences, notices and the like."""
    names = (
        path.name
        for path in folder.iterdir()
        if path.is_file() and _LEGAL_TEXT.fullmatch(path.name)
    )
    return sorted(name for name in names if not _NEVER.fullmatch(name))
