"""One checksum for the weights of a model folder, so that scores can be told apart by model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_ds.disk.read import read_json
from qwen_ds.disk.weights import file_sha256
from qwen_ds.errors import UserError

REPORT_NAME = "merge_report.json"


def model_sha256(folder: Path) -> str | None:
    """The checksum of a model folder; None where it has no weights.

    The files' own checksums are those of its merge report, where that has them all and their sizes
    are right; else the files are read, 15 GB in half a minute.
    """
    files = [file for file in sorted(folder.iterdir()) if is_weight_file(file.name)]
    known = _reported(folder)
    if any(known.get(file.name, {}).get("bytes") != file.stat().st_size for file in files):
        known = {}
    sums = {file.name: known.get(file.name, {}).get("sha256") for file in files}
    return weights_sha256({name: told or file_sha256(folder / name) for name, told in sums.items()})


def weights_sha256(sums: Mapping[str, str]) -> str | None:
    """The checksum of files of weights from their own, by file name; None for no files."""
    if not sums:
        return None
    return hashlib.sha256(json.dumps(dict(sorted(sums.items()))).encode()).hexdigest()


def is_weight_file(name: str) -> bool:
    """Whether a file of a model folder holds weights of the model, by its name."""
    is_pickle = name.startswith("pytorch_model") and name.endswith(".bin")
    is_adapter, is_hidden = name.startswith("adapter_model"), name.startswith(".")
    return (name.endswith(".safetensors") or is_pickle) and not is_adapter and not is_hidden


def _reported(folder: Path) -> dict[str, Any]:
    try:
        outputs = read_json(folder / REPORT_NAME).get("outputs")
    except UserError:
        return {}
    is_ours = isinstance(outputs, dict) and all(isinstance(one, dict) for one in outputs.values())
    return outputs if isinstance(outputs, dict) and is_ours else {}
