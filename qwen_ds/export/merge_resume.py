"""What a killed merge leaves to the next one: its finished files, and a note of what they were made from.

A file counts as finished once its name, checksum and figures are in the note. The next merge of the same inputs with
the same options checks the checksums of what is there, on both sides, and writes the rest; any other one starts over.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from qwen_ds.disk.place import require_folder
from qwen_ds.disk.write import publish, write_json
from qwen_ds.errors import UserError
from qwen_ds.export.checkpoint import file_facts
from qwen_ds.export.merge_plan import Plan
from qwen_ds.export.stream.shard import ChangedTensor, WrittenShard
from qwen_ds.export.stream.source import Source

NOTE_NAME = "merge_state.json"
_UNFINISHED_NOTE = NOTE_NAME + ".tmp"
_LOCK_NAME = "merge.lock"


def recipe_of(plan: Plan, adapter_files: dict[str, dict[str, Any]], block_bytes: int) -> str:
    """A checksum of all that decides the output's bytes, but for those of the base's weights.

    These are held by their size and time here, and by their checksums once a file has been read from end to end: not
    before the last tensor of it is written where the output is cut otherwise, and never of a pickle.
    """
    files = [shard.path.stat() for shard in plan.base.shards]
    told = {
        "base": [
            (shard.path.name, at.st_size, at.st_mtime_ns)
            for shard, at in zip(plan.base.shards, files, strict=True)
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
    """The folder that a merge works in, beside its output: a context manager, which one merge at a time can enter.

    `folder` in it becomes the output. The note and the lock lie beside that and go last: what a kill leaves can be told
    from what somebody else put there, and until the output has its name the note says what is finished.
    """

    def __init__(self, beside: Path, recipe: str) -> None:
        self.folder = beside / "model"
        self._beside = beside
        self._recipe = recipe
        self.finished: dict[str, WrittenShard] = {}

    def __enter__(self) -> Progress:
        """Make the place and lock it.

        Raises:
            UserError: another merge has it, or something is there that no merge left.
        """
        if self._beside.exists():
            found = (
                {path.name for path in self._beside.iterdir()} if self._beside.is_dir() else {""}
            )
            if found and not found & {NOTE_NAME, _UNFINISHED_NOTE, _LOCK_NAME}:
                raise UserError(
                    f"{self._beside}: in the way and not a killed merge's; expected to build the output there"
                )
        require_folder(self._beside, make=True)
        path = self._beside / _LOCK_NAME
        self._lock = path.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.exists() and os.path.samestat(os.fstat(self._lock.fileno()), path.stat())
        except OSError as error:
            ours = error.errno not in (
                errno.EWOULDBLOCK,
                errno.EACCES,
            )  # others: a file system without locks
        if not ours:
            self._lock.close()
            raise UserError(
                f"{self._beside}: another merge is building this output; expected one at a time"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.folder.exists():  # nothing to go on from
            self.discard()
        self._lock.close()

    def discard(self) -> None:
        """Remove everything: first what is large, last what says whose it is."""
        for path in self._beside.iterdir() if self._beside.exists() else ():
            if path.name not in (NOTE_NAME, _LOCK_NAME):
                _remove(path)
        for name in (NOTE_NAME, _LOCK_NAME):
            (self._beside / name).unlink(missing_ok=True)
        if self._beside.exists():
            self._beside.rmdir()

    def take_up(self, source: Source) -> None:
        """Keep what an earlier merge of the same recipe finished and clear away the rest."""
        note = self._read_note()
        same = note.get("recipe") == self._recipe
        if same and all(source.facts(name) == facts for name, facts in note["inputs"].items()):
            for name, stored in note["finished"].items():
                path = self.folder / name
                if path.is_file() and file_facts(path) == stored["facts"]:
                    changed = {
                        tensor: ChangedTensor(**after)
                        for tensor, after in stored["changed"].items()
                    }
                    self.finished[name] = WrittenShard(stored["facts"], changed)
        for path in self._beside.iterdir():
            if path.name not in (NOTE_NAME, _LOCK_NAME, self.folder.name):
                _remove(path)
        for path in self.folder.iterdir() if self.folder.exists() else ():
            if path.name not in self.finished:
                _remove(path)

    def _read_note(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self._beside / NOTE_NAME).read_text(encoding="utf-8")))
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
        """Make the output's folder, if it is not there, and note what it is made from."""
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
        write_json(self._beside / _UNFINISHED_NOTE, note)
        os.replace(self._beside / _UNFINISHED_NOTE, self._beside / NOTE_NAME)

    def finish(self, output: Path) -> None:
        """The folder is complete and gets its name."""
        publish(self.folder, output)
        self.discard()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
