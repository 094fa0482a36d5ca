"""The files and libraries that a run begins with, beside its recipe and its token rows.

A resumed run must find the same base and the same first adapter: on another base its loss would
jump, and nobody would know why. Reading 15 GB takes too long for a start, so there are two kinds of
hash. The quick one covers a file's size, its header and three blocks of each tensor: whoever
trains, merges or converts a base changes those. The whole one covers every byte; rank 0 makes it in
a thread while the training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qwen_ds.disk.adapter_folder import CONFIG_NAME, PICKLE_NAMES, WEIGHTS_NAME
from qwen_ds.disk.read import read_json
from qwen_ds.disk.shards import find_weight_files
from qwen_ds.disk.weights import read_header
from qwen_ds.disk.write import write_json
from qwen_ds.errors import UserError
from qwen_ds.plan.first_adapter import read_first_adapter
from qwen_ds.plan.run import Run
from qwen_ds.runlog import say

PACKAGES = (
    "torch", "transformers", "peft", "deepspeed", "datasets", "tiktoken", "safetensors", "numpy",
)  # fmt: skip
BLOCK_BYTES = 4096
BLOCKS_OF_A_PICKLE = 512  # whose tensors have no places that are known without loading it
_END_SECONDS = 5.0
_READERS = 8  # a network disk answers many small reads at once
# Keys of config.json that change no number of a training.
_IMMATERIAL = {
    "bf16", "fp16", "fp32", "initializer_range", "model_type", "tokenizer_class", "use_cache",
}  # fmt: skip
# A training reads nothing else of generation_config.json.
_GENERATION = "chat_format"
_BASE, _ADAPTER = "base/", "adapter/"

Hashes = dict[str, str]
"""sha256 in hex, by "base/" or "adapter/" and the name of a file."""


@dataclass(frozen=True, slots=True)
class Began:
    """Everything that a run began with, as identity.json and the checkpoints keep it."""

    settings: dict[str, Any]
    """Keys of config.json that matter, under today's names, and generation_config's chat_format."""
    vocabulary: str
    files: Hashes  # the quick ones
    versions: dict[str, str]
    whole: Hashes = field(default_factory=dict)
    """Of every byte; empty as long as no start has read them all."""

    @classmethod
    def of(cls, run: Run) -> Began:
        """Read the beginning of `run` from its files: a few megabytes of the largest base."""
        config, paths = run.base.config, files_of(run)
        names = [name for name in type(config).__annotations__ if name not in _IMMATERIAL]
        settings = {name: vars(config)[name] for name in names if name in vars(config)}
        settings[_GENERATION] = run.base.chat_format
        with ThreadPoolExecutor(_READERS) as pool:
            hashes = dict(zip(paths, pool.map(quick_sha256, paths.values()), strict=True))
        plain = json.loads(json.dumps(settings))
        return cls(plain, run.encoding.sha256, hashes, versions(run.liger))

    @classmethod
    def stored(cls, found: object) -> Began | None:
        """From JSON; None where an earlier release kept nothing, or a later one something else."""
        try:
            return cls(**found) if isinstance(found, dict) else None
        except TypeError:
            return None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class InputChange:
    """One thing that is not as it was when the run began."""

    option: str  # of the recipe, that names the changed folder
    what: str
    was: str
    now: str


def versions(liger: str | None) -> dict[str, str]:
    """The libraries that decide about the last bits of a number, and Python; liger-kernel where it
    computes pieces of the blocks."""
    found = {name: metadata.version(name) for name in PACKAGES}
    pieces = {} if liger is None else {"liger-kernel": liger}
    python = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    return python | found | pieces


def files_of(run: Run) -> dict[str, Path]:
    """The weights of the base, and the files of the first adapter, by their names in `Hashes`."""
    found = find_weight_files(run.base_folder)
    base = [run.base_folder / name for name in found.names] if found else []
    adapter: list[Path] = []
    options = run.recipe.lora
    if run.recipe.method == "lora" and options.init_from is not None:
        folder = read_first_adapter(options).folder
        names = (CONFIG_NAME, WEIGHTS_NAME, *PICKLE_NAMES)
        adapter = [folder / name for name in names if (folder / name).is_file()]
    return {_BASE + p.name: p for p in base} | {_ADAPTER + p.name: p for p in adapter}


def quick_sha256(path: Path) -> str:
    """Hash a file's size and header, and three blocks of each tensor; a small file whole."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        for start, length in _blocks(path, size):
            digest.update(os.pread(file.fileno(), length, start))
    return digest.hexdigest()


def _blocks(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """Start and length of each part of a file that is hashed at once."""
    if size <= BLOCKS_OF_A_PICKLE * BLOCK_BYTES:
        yield 0, size
    elif path.suffix == ".safetensors":
        header = read_header(path)
        yield 0, header.data_start
        starts = header.starts
        for spec in header.tensors:
            start, room = starts[spec.name], spec.num_bytes
            for place in dict.fromkeys((0, room // 2, max(0, room - BLOCK_BYTES))):
                yield start + place, min(BLOCK_BYTES, room - place)
    else:
        for i in range(BLOCKS_OF_A_PICKLE):
            yield (size - BLOCK_BYTES) * i // (BLOCKS_OF_A_PICKLE - 1), BLOCK_BYTES


def changes(began: Began, now: Began) -> Iterator[InputChange]:
    """Everything that is not as it was, libraries excepted: the base first, then the adapter."""
    for key in sorted({*began.settings, *now.settings}):
        was, found = began.settings.get(key), now.settings.get(key)
        if was != found:
            name = "generation_config.json" if key == _GENERATION else "config.json"
            yield InputChange("model.path", f"{key} of {name}", repr(was), repr(found))
    if began.vocabulary != now.vocabulary:
        hashes = _short(began.vocabulary), _short(now.vocabulary)
        yield InputChange("model.path", "the vocabulary", *hashes)
    # Backwards: "base/" before "adapter/".
    for name in sorted({*began.files, *now.files}, reverse=True):
        old, new = began.files.get(name), now.files.get(name)
        if old != new:
            option = "model.path" if name.startswith(_BASE) else "lora.init_from"
            yield InputChange(option, name.partition("/")[2], _short(old), _short(new))


def _short(sha256: str | None) -> str:
    return "absent" if sha256 is None else f"sha256 {sha256[:12]}"


def other_versions(began: Began, now: Began) -> str | None:
    """The libraries whose versions have changed, in words; None if none has."""
    pairs = [
        (name, began.versions.get(name, "none"), now.versions.get(name, "none"))
        for name in sorted({*began.versions, *now.versions})
    ]
    changed = [f"{name} was {was} and is {found}" for name, was, found in pairs if was != found]
    return ", ".join(changed) or None


def known_later(began: Began, file: Path) -> Hashes:
    """Hashes of whole files that were recorded in `file` after the last save; empty if none were,
    or not for these files."""
    try:
        stored = Began.stored(read_json(file))
    except UserError:
        return {}
    return stored.whole if stored and stored.files == began.files else {}


class WholeFiles:
    """A thread that reads every byte of the base and of the first adapter, while it is entered.

    It has the lowest priority, and begins when they have been loaded, so most of them are still in
    memory. Bytes that an earlier start has recorded are compared: see `wait`. Otherwise they are
    recorded in `file` and in the checkpoints, as soon as all are known. A run that ends before has
    none recorded, and its next start tries again.

    Args:
        unsure: the checkpoint that the run resumes from, where its bytes were not compared.
    """

    def __init__(
        self, began: Began, paths: Mapping[str, Path], file: Path, unsure: Path | None = None
    ) -> None:
        self.began, self._unsure = began, unsure
        self._paths, self._file = paths, file
        self._change: str | None = None
        self._compared = False
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._read, name="whole files", daemon=True)

    def __enter__(self) -> WholeFiles:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join(_END_SECONDS)  # a disk that does not answer must not hold up the end

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the bytes are compared, if there are any to compare with, or for `seconds`.

        Each save does it first: however slow the disk, no checkpoint says that it is of this run
        and is of another base. Where it waited for `seconds` alone, it says `compared` false.
        UserError names the file that has changed.
        """
        if self.began.whole:
            self._thread.join(seconds)
        if self._change:
            raise UserError(self._change)

    @property
    def compared(self) -> bool:
        """Whether no bytes are left to compare with those that the run began with."""
        return self._compared or not self.began.whole

    def _read(self) -> None:
        with suppress(OSError):  # Linux: of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        found: Hashes = {}
        try:
            for name, path in self._paths.items():
                sha256 = self._sha256(path)
                if sha256 is None:
                    return
                found[name] = sha256
                if found[name] != self.began.whole.get(name, found[name]):
                    self._change = (
                        f"{path}: was {_short(self.began.whole[name])} when the run began and is "
                        f"{_short(sha256)} now; expected the same file ({self._saved()})"
                    )
                    return
            self._compared = True
            if found != self.began.whole:
                self.began = replace(self.began, whole=found)
                write_json(self._file, self.began.as_json())
        except OSError as error:
            say(f"{error.filename}: {error.strerror}; its bytes are not compared from now on")

    def _saved(self) -> str:
        if self._unsure is None:
            return "nothing was saved since this start"
        return f"{self._unsure} was saved before this was known: remove it, or begin anew"

    def _sha256(self, path: Path) -> str | None:
        """None: the run has ended meanwhile."""
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while block := file.read(1 << 22):
                digest.update(block)
                if self._ends.is_set():
                    return None
        return digest.hexdigest()
