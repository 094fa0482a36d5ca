"""What a run leaves behind: adapters or whole models, written by rank 0 from state that all ranks give."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_ds import dist
from qwen_ds.model.folder import carry_over, write_json
from qwen_ds.train import lora
from qwen_ds.train.engine import Engine
from qwen_ds.train.runfolder import keep_newest, step_folder

SHARD_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go. adapter_config None: full training, the result is a model folder."""

    folder: Path
    base: Path
    dtype: torch.dtype
    adapter_config: lora.LoraConfig | None

    def save_step(self, engine: Engine, step: int, keep: int) -> Path:
        """Write the state after `step` under checkpoints/ (a collective); returns the folder."""
        target = step_folder(self.folder, step)
        if dist.max_floats(dist.rank() == 0 and target.exists())[0]:
            return target  # written at the end of this very step; nothing has changed since
        self._save(engine, target)
        if dist.rank() == 0:
            keep_newest(self.folder, keep)
        return target

    def save_final(self, engine: Engine) -> None:
        """Write adapter/ or model/ (a collective)."""
        self._save(engine, self.folder)

    def _save(self, engine: Engine, parent: Path) -> None:
        if self.adapter_config is None:
            self._save_model(engine, parent / "model")
        else:
            tensors = engine.trainable_tensors()
            if dist.rank() == 0:
                lora.write_adapter(parent / "adapter", self.adapter_config, tensors)
        dist.barrier()

    def _save_model(self, engine: Engine, target: Path) -> None:
        """A complete folder in the official layout, built beside and renamed."""
        if dist.rank() != 0:
            for _ in engine.all_tensors(self.dtype):  # gives its part of each tensor
                pass
            return
        unfinished = target.with_name(target.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        shards = _Shards(unfinished)
        for name, tensor in engine.all_tensors(self.dtype):
            shards.add(name, tensor)
        shards.finish()
        carry_over(self.base, unfinished)
        unfinished.rename(target)


class _Shards:
    """Writes tensors into safetensors files of SHARD_BYTES at most, one file's tensors in memory at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._number_of: dict[str, int] = {}
        self._count = self._bytes = self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._tensors and self._bytes + tensor.nbytes > SHARD_BYTES:
            self._write()
        self._tensors[name] = tensor.contiguous()
        self._number_of[name] = self._count + 1
        self._bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the last file, and give all their final names, which say how many there are."""
        self._write()
        if self._count == 1:
            (self._folder / "shard-1").rename(self._folder / "model.safetensors")
            return
        names = {n: f"model-{n:05d}-of-{self._count:05d}.safetensors" for n in range(1, self._count + 1)}
        for number, name in names.items():
            (self._folder / f"shard-{number}").rename(self._folder / name)
        places = {tensor: names[number] for tensor, number in self._number_of.items()}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
        write_json(self._folder / "model.safetensors.index.json", index)

    def _write(self) -> None:
        self._count += 1
        file = self._folder / f"shard-{self._count}"
        save_file(self._tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)
        self._tensors, self._bytes = {}, 0
