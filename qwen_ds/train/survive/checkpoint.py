"""Checkpoints on disk: complete or absent, never half. Files only; no model, no process group.

    checkpoints/step_000500/   adapter/ or model/, optimizer.safetensors or shard_*.safetensors, rng.safetensors,
                               and state.json: what the run needs to go on, with the sha256 of every file beside it
    latest  best               in the run folder; each names a checkpoint

A checkpoint is written into a hidden folder beside the others, every file and the folder itself are synchronised to the
disk, and only then it gets its name. So at each instant the newest folder whose checksums hold is a whole checkpoint
(tests/faults kills a save at every one of its file operations).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch import uint8 as torch_uint8

from qwen_ds.disk.weights import DTYPE_NAMES, TensorSpec, file_sha256, header_bytes
from qwen_ds.disk.write import sync

STATE = "state.json"
LATEST, BEST = "latest", "best"
FORMAT = 1
_CHUNK_BYTES = 16 * 2**20


def step_folder(run: Path, step: int) -> Path:
    """checkpoints/step_000382"""
    return run / "checkpoints" / f"step_{step:06d}"


def steps_saved(run: Path) -> list[int]:
    """The steps that have a checkpoint folder, whole or not, ascending. Folders with other names are the user's."""
    found = (
        re.fullmatch(r"step_(\d{6,})", path.name) for path in (run / "checkpoints").glob("step_*")
    )
    return sorted(int(match[1]) for match in found if match)


def write_file(
    path: Path, blocks: Iterable[memoryview], getting_on: Callable[[], object] = lambda: None
) -> str:
    """Write a file and wait until the disk has it; returns its sha256, taken while writing. Mode 0644.

    Args:
        getting_on: called after each 16 MB.

    Raises:
        OSError: of the disk.
    """
    sha256 = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for block in blocks:
            for start in range(0, len(block), _CHUNK_BYTES):
                rest = block[start : start + _CHUNK_BYTES]
                sha256.update(rest)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                getting_on()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return sha256.hexdigest()


def write_text(path: Path, text: str) -> str:
    return write_file(path, [memoryview(text.encode())])


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], getting_on: Callable[[], object] = lambda: None
) -> str:
    """Write a safetensors file straight from the tensors' own memory (the library's writer copies all of them first);
    returns its sha256.

    Args:
        tensors: a contiguous one on the CPU is not copied.
    """
    specs = [
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]

    def blocks() -> Iterator[memoryview]:
        yield memoryview(header_bytes(specs, {}))
        for tensor in tensors.values():
            yield tensor.detach().cpu().contiguous().flatten().view(torch_uint8).numpy().data

    return write_file(path, blocks(), getting_on)


def unfinished_folder(run: Path, step: int) -> Path:
    """A fresh folder in which the checkpoint of `step` is put together."""
    parent = run / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished(run)
    folder = parent / f".step_{step:06d}.unfinished"
    folder.mkdir()
    return folder


def clear_unfinished(run: Path) -> None:
    """Remove what a killed save left."""
    for folder in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(folder)


def finish(
    run: Path, folder: Path, step: int, state: Mapping[str, Any], sha256_of: Mapping[str, str]
) -> Path:
    """Give an unfinished checkpoint its name, after state.json and the disk's confirmation."""
    text = (
        json.dumps(
            {"format": FORMAT, **state, "files": dict(sha256_of)}, indent=2, ensure_ascii=False
        )
        + "\n"
    )
    write_text(folder / STATE, text)
    for inner in {(folder / name).parent for name in sha256_of} | {folder}:
        sync(inner)
    target = step_folder(run, step)
    if target.exists():  # a damaged one of the same step, which the run has stepped back from
        target.rename(target.with_name(f".{target.name}.replaced"))
    folder.rename(target)
    sync(target.parent)
    return target


def point(run: Path, name: str, step: int) -> None:
    """Let `latest` or `best` name the checkpoint of `step`."""
    unfinished = run / f".{name}.unfinished"
    write_text(unfinished, step_folder(run, step).name + "\n")
    unfinished.replace(run / name)
    sync(run)


def pointed(run: Path, name: str) -> str | None:
    """The checkpoint that `latest` or `best` names."""
    file = run / name
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def keep_newest(run: Path, keep: int, step: int) -> None:
    """Delete all checkpoints but the `keep` newest up to `step`, and the best. Later ones are of a time that the run
    has stepped back from, since they are damaged: it writes them anew when it comes to them."""
    found = [step_folder(run, saved) for saved in steps_saved(run) if saved <= step]
    best = pointed(run, BEST)
    for old in found[: max(0, len(found) - keep)]:
        if old.name != best:
            # Hidden first: a folder that is half deleted must not look like a checkpoint.
            hidden = old.with_name(f".{old.name}.deleted")
            old.rename(hidden)
            shutil.rmtree(hidden)


def tidy(run: Path, step: int, best: int | None, keep: int) -> None:
    """What follows a checkpoint's rename, and what a kill may have kept a save from doing: the pointers, and the end of
    what is too old."""
    clear_unfinished(run)
    point(run, LATEST, step)
    if best is not None and step_folder(run, best).is_dir():
        point(run, BEST, best)
    keep_newest(run, keep, step)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint: its folder and what its state.json says."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def file(self, name: str) -> Path:
        return self.folder / name


@dataclass(slots=True)
class Search:
    """What `newest` found: the checkpoint, and a line for each one that it had to pass over."""

    found: Checkpoint | None = None
    remarks: list[str] = field(default_factory=list)


def newest(run: Path, before: int | None = None) -> Search:
    """The newest checkpoint whose files are those that its state.json lists; shards are left to the ranks that read
    them. `before`: only older ones than this step."""
    search = Search()
    for step in reversed(steps_saved(run)):
        if before is not None and step >= before:
            continue
        folder = step_folder(run, step)
        state = _read_state(folder)
        if isinstance(state, str):
            search.remarks.append(f"{folder} is passed over: {state}")
            continue
        names = [name for name in state["files"] if not name.startswith("shard_")]
        if damage := damaged(Checkpoint(folder, state), names):
            search.remarks.append(f"{folder} is passed over: {damage}")
            continue
        search.found = Checkpoint(folder, state)
        break
    return search


def damaged(checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
    """What is wrong with one of these files; None if all have the sha256 that state.json says."""
    for name in names:
        file = checkpoint.file(name)
        if not file.is_file():
            return f"{name} is missing"
        if file_sha256(file) != checkpoint.state["files"].get(name):
            return f"{name} is not what was saved (sha256; {file.stat().st_size:,} bytes)"
    return None


def _read_state(folder: Path) -> dict[str, Any] | str:
    file = folder / STATE
    if not file.is_file():
        # Also what checkpoints of the first release are: weights without the optimizer's state.
        return f"it has no {STATE}"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if (
            not isinstance(state, dict)
            or state["format"] != FORMAT
            or not isinstance(state["files"], dict)
        ):
            return f"{STATE} is of format {state.get('format') if isinstance(state, dict) else state!r}; not {FORMAT}"
    except (ValueError, KeyError) as error:
        return f"{STATE} is damaged ({type(error).__name__})"
    return state
