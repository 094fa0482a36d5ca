"""Checkpoints on disk, each complete or absent. Files only: no model, no process group.

    checkpoints/step_000500/   adapter/, optimizer.safetensors or shard_*.safetensors,
                               rng.safetensors, and state.json: what a resumed run needs, with the
                               sha256 of every other file; in full training also model/, where
                               the evaluation after this step was the best so far
    latest  best               in the run folder; each names a checkpoint

A checkpoint is put together in a hidden folder and published in one rename (qwen_ds/disk/write.py),
so at each instant the newest folder whose checksums hold is a whole checkpoint (tests/faults kills
a save at every one of its file operations).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ds.disk.weights import file_sha256
from qwen_ds.disk.write import publish, remove_folder, unfinished_name, write_json, write_text
from qwen_ds.runlog import say

STATE = "state.json"
LATEST, BEST = "latest", "best"
FORMAT = 1


def step_folder(run: Path, step: int) -> Path:
    """checkpoints/step_000382"""
    return run / "checkpoints" / f"step_{step:06d}"


def steps_saved(run: Path) -> list[int]:
    """Steps that have a checkpoint folder, whole or not, ascending.

    Folders with other names are the user's.
    """
    names = (path.name for path in (run / "checkpoints").glob("step_*"))
    found = (re.fullmatch(r"step_(\d{6,})", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def unfinished_folder(run: Path, step: int) -> Path:
    """Make the folder in which the checkpoint of `step` is put together."""
    clear_unfinished(run)
    folder = unfinished_name(step_folder(run, step))
    folder.mkdir(parents=True)
    return folder


def clear_unfinished(run: Path) -> None:
    """Remove the leftovers of killed saves."""
    for folder in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(folder)


def finish(run: Path, step: int, state: Mapping[str, Any], sha256_of: Mapping[str, str]) -> Path:
    """Publish the unfinished checkpoint of `step`; returns its folder.

    state.json gets `state` and the sha256 of every file, by its path below the folder. A damaged
    checkpoint of the same step, which the run has stepped back from, is replaced.
    """
    target = step_folder(run, step)
    folder = unfinished_name(target)
    write_json(folder / STATE, {"format": FORMAT, **state, "files": dict(sha256_of)})
    publish(folder, target, replace=True)
    return target


def tidy(run: Path, step: int, best: int | None, keep: int) -> None:
    """Bring the folder up to date with its newest checkpoint, of `step`: `latest` and `best` name
    theirs, leftovers go, and so do old checkpoints but the `keep` newest and the best.

    Later checkpoints are damaged, which is why the run has stepped back to `step`; it replaces them
    when it reaches their steps. A resumed run does it, too: a kill may have come between the save
    and this.
    """
    clear_unfinished(run)
    write_text(run / LATEST, step_folder(run, step).name + "\n")
    file = run / BEST
    if best is not None and step_folder(run, best).is_dir():
        write_text(file, step_folder(run, best).name + "\n")
    kept = file.read_text(encoding="utf-8").strip() if file.is_file() else None
    old = [step_folder(run, saved) for saved in steps_saved(run) if saved <= step]
    for folder in old[: max(0, len(old) - keep)]:
        if folder.name != kept:
            remove_folder(folder)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint: its folder and what its state.json says."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def newest(run: Path, before: int | None = None) -> Checkpoint | None:
    """Find the newest checkpoint whose files are those that its state.json lists; rank 0 only.

    `before`: of an earlier step than this. Says which ones are passed over, and why. Shards are
    left to the ranks that read them.
    """
    for step in reversed(steps_saved(run)):
        if before is not None and step >= before:
            continue
        folder = step_folder(run, step)
        state = _read_state(folder)
        if isinstance(state, str):
            damage: str | None = state
        else:
            found = Checkpoint(folder, state)
            whole = [name for name in state["files"] if not name.startswith("shard_")]
            damage = damaged(found, whole)
            if damage is None:
                return found
        say(f"{folder} is passed over: {damage}")
    return None


def damaged(checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
    """The first fault of these files, in words; None if all have the sha256 of state.json."""
    for name in names:
        file = checkpoint.folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file_sha256(file) != checkpoint.state["files"].get(name):
            return f"{name} is not what was saved (sha256; {file.stat().st_size:,} bytes)"
    return None


def _read_state(folder: Path) -> dict[str, Any] | str:
    file = folder / STATE
    if not file.is_file():
        # Checkpoints of the first release are like this: weights without the optimizer's state.
        return f"it has no {STATE}"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            return f"{STATE} is of format {state!r}; not {FORMAT}"
        if state["format"] != FORMAT or not isinstance(state["files"], dict):
            return f"{STATE} is of format {state['format']}; not {FORMAT}"
    except (ValueError, KeyError) as error:
        return f"{STATE} is damaged ({type(error).__name__})"
    return state
