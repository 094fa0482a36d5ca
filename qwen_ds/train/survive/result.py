"""The result of a run: an adapter or a whole model, written by rank 0 from all ranks' state."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qwen_ds import dist
from qwen_ds.disk.shards import INDEX_NAME, plan_shards, write_index
from qwen_ds.disk.weights import file_sha256, save_tensors
from qwen_ds.disk.write import publish, unfinished_name
from qwen_ds.errors import UserError
from qwen_ds.model.carry_over import carry_over
from qwen_ds.train import lora
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.survive.watchdog import Watchdog

Files = dict[str, str]  # path below the parent -> sha256
_Write = Callable[[], str]  # writes a file and returns its sha256


@dataclass(frozen=True, slots=True)
class Output:
    """The place and kind of a run's results. adapter_config is None for full training."""

    folder: Path
    base: Path
    dtype: torch.dtype
    adapter_config: lora.LoraConfig | None

    @property
    def name(self) -> str:
        """adapter or model"""
        return "model" if self.adapter_config is None else "adapter"

    def save_final(
        self, engine: TrainingEngine, watchdog: Watchdog, into: Path | None = None
    ) -> None:
        """Write adapter/ or model/ into the run folder, or `into` another (a collective).

        Raises UserError if the disk does not take it.
        """
        final = (into or self.folder) / self.name
        unfinished = unfinished_name(final)
        problem: OSError | None = None
        try:
            if self.adapter_config is None:
                self.write_model(engine, unfinished, watchdog)
            else:
                # All ranks, once for each trainable tensor.
                tensors = engine.trainable_tensors()
                if dist.rank() == 0:
                    watchdog.touch_during(partial(self.write_values, unfinished, tensors))
        except OSError as error:  # on rank 0, which alone writes
            problem = error
        # All ranks, once: rank 0 gives the result its name, and all hear whether it could.
        dist.once(lambda: self._publish(unfinished, final, problem), "the result")

    def _publish(self, unfinished: Path, final: Path, problem: OSError | None) -> None:
        try:
            if problem:
                raise problem
            # A result may be there, if the run was resumed after it had finished.
            publish(unfinished / self.name, final, replace=True)
            shutil.rmtree(unfinished)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(
                f"{final}: the result cannot be written ({error}); expected room for it; the "
                f"newest checkpoint holds it, and the same command writes it once there is room"
            ) from error

    def write_values(self, parent: Path, tensors: Mapping[str, Tensor]) -> Files:
        """Write adapter/ or model/ below `parent`, from complete fp32 values by parameter name; on
        rank 0 only."""
        if self.adapter_config is not None:
            files = lora.write_adapter(parent / self.name, self.adapter_config, tensors)
            return {f"{self.name}/{name}": sha256 for name, sha256 in files.items()}
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        values = ((name, tensor.to(self.dtype)) for name, tensor in tensors.items())
        return self._write_model(parent, sizes, values, lambda write: write())

    def write_model(self, engine: TrainingEngine, parent: Path, watchdog: Watchdog) -> Files:
        """Write model/ below `parent`, in the official layout (a collective; rank 0 writes)."""

        def gathered() -> Iterator[tuple[str, Tensor]]:
            # All ranks, once for each parameter: under ZeRO it lies in pieces.
            for named in engine.all_tensors(self.dtype):
                watchdog.touch()
                yield named

        rest = gathered()
        try:
            if dist.rank():
                return {}
            return self._write_model(parent, engine.sizes(), rest, watchdog.touch_during)
        finally:
            for _ in rest:  # each rank gives its part of every tensor, even if the disk is full
                pass

    def _write_model(
        self,
        parent: Path,
        sizes: Mapping[str, int],
        tensors: Iterator[tuple[str, Tensor]],
        run: Callable[[_Write], str],
    ) -> Files:
        """Write shard by shard: one shard's tensors are in memory at a time.

        `sizes`: elements of each tensor, in the order of `tensors`. `run` calls a function that
        waits for the disk.
        """
        target = parent / self.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        num_bytes = {name: size * self.dtype.itemsize for name, size in sizes.items()}
        plan = plan_shards(num_bytes)
        files = {}
        for file, names in plan.items():
            shard = dict(next(tensors) for _ in names)
            assert list(shard) == names, (file, names, list(shard))
            files[file] = run(partial(save_tensors, target / file, shard))
            del shard  # before the next one's tensors are gathered
        if len(plan) > 1:
            files[INDEX_NAME] = write_index(target, plan, sum(num_bytes.values()))
        files |= {name: file_sha256(target / name) for name in carry_over(self.base, target)}
        return {f"{self.name}/{name}": sha256 for name, sha256 in files.items()}
