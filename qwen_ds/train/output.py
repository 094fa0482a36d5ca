"""What a run leaves behind: adapters or whole models, written by rank 0 from state that all ranks give."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_ds import dist
from qwen_ds.train import lora
from qwen_ds.train.engine import Engine
from qwen_ds.train.runfolder import keep_newest, step_folder

SHARD_BYTES = 4_000_000_000
# Files of the base that belong to a model folder beside its weights.
SIDE_FILES = ("config.json", "generation_config.json", "qwen.tiktoken", "tokenizer_config.json", "LICENSE*", "NOTICE*")


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
            return
        tensors = engine.trainable_tensors()
        if dist.rank() == 0:
            lora.write_adapter(parent / "adapter", self.adapter_config, tensors)
        dist.barrier()

    def _save_model(self, engine: Engine, target: Path) -> None:
        """A complete folder in the official layout, built beside and renamed; one shard in memory at a time."""
        unfinished = target.with_name(target.name + ".unfinished")
        if dist.rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        shards: list[dict[str, Tensor]] = [{}]
        sizes = [0]
        index: dict[str, int] = {}
        for name, tensor in engine.all_tensors(self.dtype):
            if dist.rank() != 0:
                continue
            size = tensor.numel() * tensor.element_size()
            if sizes[-1] and sizes[-1] + size > SHARD_BYTES:
                self._write_shard(unfinished, len(shards), shards[-1])
                shards[-1] = {}
                shards.append({})
                sizes.append(0)
            shards[-1][name] = tensor.contiguous()
            sizes[-1] += size
            index[name] = len(shards)
        if dist.rank() == 0:
            self._write_shard(unfinished, len(shards), shards[-1])
            _name_shards(unfinished, index, len(shards), sum(sizes))
            for pattern in SIDE_FILES:
                for file in self.base.glob(pattern):
                    shutil.copy(file, unfinished / file.name)
            unfinished.rename(target)
        dist.barrier()

    @staticmethod
    def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
        file = folder / f"shard-{number:05d}"
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)


def _name_shards(folder: Path, index: dict[str, int], count: int, total_bytes: int) -> None:
    if count == 1:
        (folder / "shard-00001").rename(folder / "model.safetensors")
        return
    names = {n: f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    for number, name in names.items():
        (folder / f"shard-{number:05d}").rename(folder / name)
    content = {"metadata": {"total_size": total_bytes}, "weight_map": {k: names[n] for k, n in index.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
