"""Saving while training goes on: the ranks give their state, rank 0 writes it in a thread of its own.

A LoRA run's state is small: it is gathered whole on rank 0, and the training stands still only for that. Full
training's state is as large as the machine: each rank writes its own pieces, and all wait for the slowest.
"""

from __future__ import annotations

import base64
import json
import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_ds import dist
from qwen_ds.runlog import say
from qwen_ds.train.engine.engine import Engine
from qwen_ds.train.engine.state import MOMENTS, VALUE
from qwen_ds.train.observe.evaluation import BestLoss
from qwen_ds.train.survive import checkpoint
from qwen_ds.train.survive.checkpoint import Checkpoint
from qwen_ds.train.survive.result import Output
from qwen_ds.train.survive.watchdog import Watchdog

log = logging.getLogger(__name__)

OPTIMIZER, RNG = "optimizer.safetensors", "rng.safetensors"


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands after `step` optimizer steps, apart from weights and moments."""

    step: int
    steps_per_epoch: int
    progress: dict[str, Any]  # of Progress.state(); {} on other ranks than 0
    schedule: dict[str, Any]  # its name, the run's steps, and the learning rate of the next step
    best: BestLoss = BestLoss()
    evaluated: bool = True
    """False: stopped before the evaluation that was due after this step."""


def shard_name(rank: int, world: int) -> str:
    return f"shard_{rank:05d}_of_{world:05d}.safetensors"


class Saver:
    """Writes checkpoints into the run folder.

    Args:
        identity: what a resumed run is compared with (hashes of recipe and data); goes into state.json.
        keep: newest checkpoints that stay.
        found: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        output: Output,
        identity: dict[str, Any],
        keep: int,
        watchdog: Watchdog,
        found: Checkpoint | None,
    ) -> None:
        self._output, self._identity, self._keep, self._watchdog = output, identity, keep, watchdog
        self._saved_step = found.step if found else None
        self._run = output.folder
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        if found and dist.rank() == 0:
            checkpoint.tidy(self._run, found.step, found.state["best"]["step"], keep)

    def save(self, engine: Engine, state: RunState) -> Path:
        """Save the state after `state.step` (a collective); returns the folder it will have.

        A failure (a full disk) is said, leaves the older checkpoints alone, and does not end the training.
        """
        target = checkpoint.step_folder(self._run, state.step)
        self.wait()
        if dist.max_floats(dist.rank() == 0 and self._saved_step == state.step)[0]:
            return target  # nothing has changed since; to write it again would leave a moment without it
        described = self._describe(engine, state)
        rng = dist.gather_texts(_rng_state())
        if self._sharded(engine):
            self._save_shards(engine, state, described, rng)
            return target
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in (VALUE, *MOMENTS)}
        for name, kind, tensor in engine.state.gather(VALUE, *MOMENTS):
            self._watchdog.touch()
            if dist.rank() == 0:
                tensors[kind][name] = tensor
        if dist.rank() == 0:
            self._thread = threading.Thread(
                target=self._write_whole,
                args=(state, described, rng, tensors),
                name="saver",
                daemon=True,
            )
            self._thread.start()
        return target

    def wait(self) -> bool:
        """Wait until the last save is on the disk (a collective without a time-out); whether it succeeded."""
        dist.once(self._join, "the saver")
        return not dist.max_floats(self._failure is not None)[0]

    def _join(self) -> None:
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(1.0)
            self._watchdog.touch()
        self._thread = None

    def _sharded(self, engine: Engine) -> bool:
        """Full training under ZeRO: the state stays in the ranks' pieces."""
        return self._output.adapter_config is None and engine.stage > 0

    def _describe(self, engine: Engine, state: RunState) -> dict[str, Any]:
        epoch, step_in_epoch = divmod(state.step, state.steps_per_epoch)
        return {
            "step": state.step,
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "schedule": state.schedule,
            "optimizer_steps": engine.state.steps,
            "loss_scaler": engine.state.loss_scaler(),
            "overflows": engine.overflows,
            "evaluated": state.evaluated,
            "best": asdict(state.best),
            "progress": state.progress,
            "ranks": dist.world_size(),
            "zero_stage": engine.stage,
            "sharded": self._sharded(engine),
            **self._identity,
        }

    def _write_whole(
        self,
        state: RunState,
        described: dict[str, Any],
        rng: list[str],
        tensors: dict[str, dict[str, Tensor]],
    ) -> None:
        """In the thread of rank 0."""
        try:
            folder = checkpoint.unfinished_folder(self._run, state.step)
            files = self._output.write_values(folder, tensors[VALUE])
            # An adapter holds the fp32 values themselves, a model what they are in its dtype.
            kinds = MOMENTS if self._output.adapter_config is not None else (VALUE, *MOMENTS)
            held = {
                f"{name}.{kind}": tensor for kind in kinds for name, tensor in tensors[kind].items()
            }
            files[OPTIMIZER] = checkpoint.write_tensors(folder / OPTIMIZER, held)
            self._finish(folder, state, described, rng, files)
        except (
            Exception
        ) as error:  # of the disk; or ours, and then no reason to lose a day's training
            log.exception("saving step %d has failed", state.step)
            self._give_up(state.step, error)

    def _save_shards(
        self, engine: Engine, state: RunState, described: dict[str, Any], rng: list[str]
    ) -> None:
        """All ranks: each writes its pieces, rank 0 also the model."""
        folder = checkpoint.step_folder(self._run, state.step)
        folder = folder.with_name(f".{folder.name}.unfinished")
        files: dict[str, str] = {}
        failures: list[OSError] = []
        if dist.rank() == 0:
            _catch(failures, lambda: checkpoint.unfinished_folder(self._run, state.step))
        dist.barrier()
        name = shard_name(dist.rank(), dist.world_size())
        if not failures and not folder.is_dir():
            failures.append(
                OSError(
                    0,
                    f"rank {dist.rank()} does not see it; full training needs output_dir on a shared disk",
                    folder,
                )
            )
        if not failures:
            pieces, touch = engine.state.pieces(), self._watchdog.touch
            _catch(
                failures,
                lambda: files.update(
                    {name: checkpoint.write_tensors(folder / name, pieces, touch)}
                ),
            )
        dist.meet("shards written")  # disks differ, and a collective has a time-out
        _catch(
            failures, lambda: files.update(self._output.write_model(engine, folder, self._watchdog))
        )
        told = dist.gather_texts(json.dumps([files, str(failures[0]) if failures else ""]))
        parts = [json.loads(text) for text in told]
        failure = next((text for _, text in parts if text), "")

        def finish() -> None:
            try:
                if failure:
                    raise OSError(failure)
                self._finish(
                    folder,
                    state,
                    described,
                    rng,
                    {k: v for part, _ in parts for k, v in part.items()},
                )
            except OSError as error:
                self._give_up(state.step, error)

        dist.once(finish, "the checkpoint")

    def _finish(
        self,
        folder: Path,
        state: RunState,
        described: dict[str, Any],
        rng: list[str],
        files: dict[str, str],
    ) -> None:
        states = {
            f"rank_{rank}.{kind}": t
            for rank, text in enumerate(rng)
            for kind, t in _rng_tensors(text).items()
        }
        files[RNG] = checkpoint.write_tensors(folder / RNG, states)
        target = checkpoint.finish(self._run, folder, state.step, described, files)
        self._failure, self._saved_step = None, state.step
        log.info("saved %s", target)
        try:
            checkpoint.tidy(self._run, state.step, state.best.step, self._keep)
        except OSError as error:
            say(f"step {state.step} is saved, but {error}")

    def _give_up(self, step: int, error: Exception) -> None:
        shutil.rmtree(
            checkpoint.step_folder(self._run, step).with_name(f".step_{step:06d}.unfinished"), True
        )
        self._failure = f"{error}"
        say(
            f"step {step} is not saved: {error}; the checkpoints before it are kept and the training goes on"
        )


def _catch(failures: list[OSError], action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        failures.append(error)


def _rng_state() -> str:
    """torch's generators of this rank. Dropout is seeded per micro-batch, so nothing of ours draws from them; a
    library that does goes on where it was."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return json.dumps(
        {kind: base64.b64encode(t.numpy().tobytes()).decode() for kind, t in states.items()}
    )


def _rng_tensors(text: str) -> dict[str, Tensor]:
    states = json.loads(text)
    return {
        k: torch.frombuffer(bytearray(base64.b64decode(v)), dtype=torch.uint8)
        for k, v in states.items()
    }
