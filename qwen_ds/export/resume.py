"""What a killed merge leaves to the next one: its finished files, and a note of what they were made from.

A file counts as finished once its name, checksum and figures are in the note. The next merge of the same inputs with
the same options checks the checksums of what is there, on both sides, and writes the rest; any other one starts over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_ds.errors import UserError
from qwen_ds.export.checkpoint import file_facts
from qwen_ds.export.plan import Plan
from qwen_ds.export.report import REPORT_NAME
from qwen_ds.export.source import Source
from qwen_ds.export.stream import ChangedTensor, WrittenShard
from qwen_ds.model.folder import require_folder, write_json

NOTE_NAME = "merge_state.json"
_UNFINISHED_NOTE = NOTE_NAME + ".tmp"


def recipe_of(plan: Plan, adapter_files: dict[str, dict[str, Any]], block_bytes: int) -> str:
    """A checksum of all that decides the output's bytes, but for those of the base's weights.

    These are held by their size and time here, and by their checksums once they have been read.
    """
    files = [shard.path.stat() for shard in plan.base.shards]
    told = {
        "base": [
            (shard.path.name, at.st_size, at.st_mtime_ns) for shard, at in zip(plan.base.shards, files, strict=True)
        ],
        "tensors": [asdict(spec) for spec in plan.base.tensors.values()],
        "adapters": {name: facts["sha256"] for name, facts in adapter_files.items()},
        "weights": plan.adapters.weights,
        "layout": {name: [asdict(rows) for rows in blocks] for name, blocks in plan.layout.items()},
        "output": [asdict(shard) for shard in plan.shards],
        # A matrix product's last bit may depend on the number of its rows.
        "block_bytes": block_bytes,
    }
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class Progress:
    """The finished files of the folder that a merge is built in."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self.folder = folder
        self._recipe = recipe
        self.finished: dict[str, WrittenShard] = {}

    def take_up(self, source: Source) -> None:
        """Keep what an earlier merge of the same recipe finished and clear away the rest.

        Raises:
            UserError: something is there that no merge left.
        """
        if not self.folder.exists():
            return
        found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else {""}
        if found and not found & {NOTE_NAME, _UNFINISHED_NOTE, REPORT_NAME}:
            raise UserError(f"{self.folder}: in the way and not a killed merge's; expected to build the output there")
        note = self._read_note()
        same = note.get("recipe") == self._recipe
        if same and all(source.facts(name) == facts for name, facts in note["inputs"].items()):
            for name, stored in note["finished"].items():
                path = self.folder / name
                if path.is_file() and file_facts(path) == stored["facts"]:
                    changed = {tensor: ChangedTensor(**after) for tensor, after in stored["changed"].items()}
                    self.finished[name] = WrittenShard(stored["facts"], changed)
        for name in found - {NOTE_NAME, *self.finished}:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _read_note(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / NOTE_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # killed before it was there
            return {}

    def changed(self) -> dict[str, ChangedTensor]:
        """The figures of all tensors that the adapters changed, over all files."""
        changed: dict[str, ChangedTensor] = {}
        for written in self.finished.values():
            for name, after in written.changed.items():
                changed[name] = changed[name].plus(after) if name in changed else after
        return dict(sorted(changed.items()))

    def start(self, source: Source) -> None:
        """Make the folder, if it is not there, and mark it as a merge's."""
        require_folder(self.folder, make=True)
        self._write_note(source)

    def add(self, name: str, written: WrittenShard, source: Source) -> None:
        """A file is finished."""
        self.finished[name] = written
        self._write_note(source)

    def _write_note(self, source: Source) -> None:
        finished = {name: asdict(written) for name, written in self.finished.items()}
        note = {"recipe": self._recipe, "inputs": source.facts_read(), "finished": finished}
        # Renamed, so that the note is never half.
        write_json(self.folder / _UNFINISHED_NOTE, note)
        os.replace(self.folder / _UNFINISHED_NOTE, self.folder / NOTE_NAME)

    def close(self) -> None:
        """The folder is complete: the note goes."""
        (self.folder / NOTE_NAME).unlink()
