"""What a run leaves behind: adapters or whole models, written by rank 0 from state that all ranks give."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen_ds import dist
from qwen_ds.disk.weights import file_sha256
from qwen_ds.disk.write import sync, write_json
from qwen_ds.errors import UserError
from qwen_ds.model.carry_over import carry_over
from qwen_ds.train import lora
from qwen_ds.train.engine.engine import Engine
from qwen_ds.train.survive.checkpoint import write_tensors
from qwen_ds.train.survive.watchdog import Watchdog

SHARD_BYTES = 4_000_000_000
Files = dict[str, str]  # path below the parent -> sha256


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go. adapter_config None: full training, the result is a model folder."""

    folder: Path
    base: Path
    dtype: torch.dtype
    adapter_config: lora.LoraConfig | None

    @property
    def name(self) -> str:
        """adapter or model"""
        return "model" if self.adapter_config is None else "adapter"

    def save_final(self, engine: Engine, watchdog: Watchdog) -> None:
        """Write adapter/ or model/ into the run folder (a collective), built beside and renamed.

        Raises:
            UserError: the disk does not take it.
        """
        unfinished = self.folder / f".{self.name}.unfinished"
        problem: OSError | None = None
        try:
            if self.adapter_config is None:
                self.write_model(engine, unfinished, watchdog)
            else:
                tensors = engine.trainable_tensors()
                if dist.rank() == 0:
                    self.write_values(unfinished, tensors)
        except OSError as error:  # on rank 0, which alone writes
            problem = error
        dist.once(lambda: self._place(unfinished, problem), "the result")

    def _place(self, unfinished: Path, problem: OSError | None) -> None:
        final, old = self.folder / self.name, self.folder / f".{self.name}.replaced"
        try:
            if problem:
                raise problem
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():  # a run that went on after it had finished once
                final.rename(old)
            (unfinished / self.name).rename(final)
            shutil.rmtree(unfinished)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(
                f"{final}: the result cannot be written ({error}); expected room for it; the newest checkpoint holds "
                f"it, and the same command writes it once there is room"
            ) from error

    def write_values(self, parent: Path, tensors: Mapping[str, Tensor]) -> Files:
        """Write adapter/ or model/ below `parent` from complete fp32 values by parameter name; rank 0 only."""
        if self.adapter_config is not None:
            files = lora.write_adapter(parent / self.name, self.adapter_config, tensors)
            return {f"{self.name}/{name}": sha256 for name, sha256 in files.items()}
        return self._write_model(
            parent, ((name, tensor.to(self.dtype)) for name, tensor in tensors.items())
        )

    def write_model(self, engine: Engine, parent: Path, watchdog: Watchdog) -> Files:
        """Write model/ below `parent`: a complete folder in the official layout (a collective; rank 0 writes)."""

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for named in engine.all_tensors(self.dtype):
                watchdog.touch()
                yield named

        rest = tensors()
        try:
            return self._write_model(parent, rest, watchdog.touch) if dist.rank() == 0 else {}
        finally:
            for _ in rest:  # each rank gives its part of every tensor, also when the disk is full
                pass

    def _write_model(
        self,
        parent: Path,
        tensors: Iterable[tuple[str, Tensor]],
        getting_on: Callable[[], object] = lambda: None,
    ) -> Files:
        target = parent / self.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        shards = _Shards(target, getting_on)
        for name, tensor in tensors:
            shards.add(name, tensor)
        files = shards.finish()
        for name in carry_over(self.base, target):
            sync(target / name)
            files[name] = file_sha256(target / name)
        return {f"{self.name}/{name}": sha256 for name, sha256 in files.items()}


class _Shards:
    """Writes tensors into safetensors files of SHARD_BYTES at most, one file's tensors in memory at a time."""

    def __init__(self, folder: Path, getting_on: Callable[[], object]) -> None:
        self._folder, self._getting_on = folder, getting_on
        self._tensors: dict[str, Tensor] = {}
        self._number_of: dict[str, int] = {}
        self._sha256s: list[str] = []
        self._bytes = self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._tensors and self._bytes + tensor.nbytes > SHARD_BYTES:
            self._write()
        self._tensors[name] = tensor
        self._number_of[name] = len(self._sha256s) + 1
        self._bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> Files:
        """Write the last file, and give all their final names, which say how many there are."""
        self._write()
        count = len(self._sha256s)
        if count == 1:
            (self._folder / "shard-1").rename(self._folder / "model.safetensors")
            return {"model.safetensors": self._sha256s[0]}
        names = {n: f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
        for number, name in names.items():
            (self._folder / f"shard-{number}").rename(self._folder / name)
        places = {tensor: names[number] for tensor, number in self._number_of.items()}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
        index_file = "model.safetensors.index.json"
        write_json(self._folder / index_file, index)
        sync(self._folder / index_file)
        return dict(zip(names.values(), self._sha256s, strict=True)) | {
            index_file: file_sha256(self._folder / index_file)
        }

    def _write(self) -> None:
        file = self._folder / f"shard-{len(self._sha256s) + 1}"
        self._sha256s.append(write_tensors(file, self._tensors, self._getting_on))
        self._tensors, self._bytes = {}, 0
