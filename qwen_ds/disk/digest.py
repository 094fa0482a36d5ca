"""One checksum for the weights of a model folder, so that scores can be told apart by model."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_ds.disk.read import read_json
from qwen_ds.disk.shards import find_weight_files
from qwen_ds.disk.weights import file_sha256
from qwen_ds.errors import UserError

REPORT_NAME = "merge_report.json"


def model_sha256(folder: Path) -> str | None:
    """The checksum of a model folder; None where it has no weights.

    The files' own checksums are those of its merge report, where that has them all and their sizes
    are right; else the files are read once, 15 GB in half a minute.
    """
    found = find_weight_files(folder)
    if found is None:
        return None
    known = _reported(folder)
    sizes = {name: (folder / name).stat().st_size for name in found.names}
    if any(known.get(name, {}).get("bytes") != size for name, size in sizes.items()):
        known = {}
    told = {name: known.get(name, {}).get("sha256") for name in found.names}
    return weights_sha256({name: sha or sha256_once(folder / name) for name, sha in told.items()})


def weights_sha256(sums: Mapping[str, str]) -> str:
    """The checksum of a model from those of its files of weights, by file name."""
    return hashlib.sha256(json.dumps(dict(sorted(sums.items()))).encode()).hexdigest()


def sha256_once(file: Path) -> str:
    """The sha256 of a file, in hex; as long as it does not change, a process reads it once."""
    stat = file.stat()
    return _sha256(file.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(file: Path, _size: int, _changed_ns: int) -> str:
    return file_sha256(file)


def _reported(folder: Path) -> dict[str, Any]:
    try:
        outputs = read_json(folder / REPORT_NAME).get("outputs")
    except UserError:
        return {}
    if not isinstance(outputs, dict) or not all(isinstance(e, dict) for e in outputs.values()):
        return {}
    return outputs
