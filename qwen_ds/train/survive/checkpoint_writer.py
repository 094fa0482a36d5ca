"""Saving during training: the ranks give their state, and rank 0 writes it in a thread of its own.

A LoRA run's state is small: it is gathered whole on rank 0, and training stands still only for
that. Full training's state is too large for one rank: each writes its own pieces, and all wait for
the slowest. There the fp32 values hold the weights already, so a model to load is written only for
the best evaluation so far, and at the end of the run (result.py).
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_ds import dist
from qwen_ds.disk.weights import save_tensors
from qwen_ds.disk.write import unfinished_name
from qwen_ds.errors import UserError
from qwen_ds.runlog import say
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.engine.state import MOMENTS, VALUE
from qwen_ds.train.observe.evaluation import BestLoss
from qwen_ds.train.survive import checkpoint
from qwen_ds.train.survive.checkpoint import Checkpoint
from qwen_ds.train.survive.identity import WholeFiles
from qwen_ds.train.survive.result import Files, Output
from qwen_ds.train.survive.watchdog import Watchdog

log = logging.getLogger(__name__)

OPTIMIZER, RNG = "optimizer.safetensors", "rng.safetensors"
# In state.json: what the run began with, and whether its bytes were compared with that.
BEGAN_WITH, COMPARED = "began_with", "compared"
# For bytes to compare, at a stop: a scheduler may give 30 seconds until it kills.
STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a run after `step` optimizer steps, weights and moments excepted."""

    step: int
    steps_per_epoch: int
    progress: dict[str, Any]  # of Progress.state(); {} on other ranks than 0
    schedule: dict[str, Any]  # its name, the run's steps, and the learning rate of the next step
    best: BestLoss = BestLoss()
    evaluated: bool = True  # False: stopped before the evaluation that was due after this step

    @property
    def is_best(self) -> bool:
        """Whether the evaluation after this step is the best so far."""
        return self.best.step == self.step


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Contents of one checkpoint beside weights and moments."""

    state: RunState
    description: dict[str, Any]  # goes into state.json
    rng: list[dict[str, Tensor]]  # of each rank


def shard_name(rank: int, world: int) -> str:
    return f"shard_{rank:05d}_of_{world:05d}.safetensors"


class Saver:
    """Writer of checkpoints into the run folder.

    Args:
        identity: hashes of recipe and data, which a resumed run must share; goes into state.json.
        keep: newest checkpoints that stay.
        resumed: the checkpoint that the run resumes from.
        whole: on rank 0, the reader of what the run began with, which goes into state.json, too.
    """

    def __init__(
        self,
        output: Output,
        identity: dict[str, str],
        keep: int,
        watchdog: Watchdog,
        resumed: Checkpoint | None,
        whole: WholeFiles | None = None,
    ) -> None:
        self.output, self.watchdog, self.resumed = output, watchdog, resumed
        self._identity, self._keep, self._run = identity, keep, output.folder
        self._saved_step = resumed.step if resumed else None
        self._whole = whole
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        if resumed and dist.rank() == 0:
            checkpoint.tidy(self._run, resumed.step, resumed.state["best"]["step"], keep)

    def save(self, engine: TrainingEngine, state: RunState, *, stopping: bool = False) -> Path:
        """Save the state after `state.step` (a collective); returns the folder it will have.

        A failure (a full disk) is reported, leaves the older checkpoints alone, and does not end
        the training. A run that is `stopping` has little time: it does not wait for all of the base
        to be compared, and the checkpoint says so. UserError: see `WholeFiles.wait`.
        """
        target = checkpoint.step_folder(self._run, state.step)
        self.wait(STOP_SECONDS if stopping else None)
        # All ranks, once a save. Nothing has changed since a save of the same step, and replacing
        # it would leave a moment without it.
        if dist.max_floats(dist.rank() == 0 and self._saved_step == state.step)[0]:
            return target
        # All ranks, once a save; a few kilobytes each.
        snapshot = _Snapshot(state, self._describe(engine, state), dist.gather(_rng_state()))
        if self._sharded(engine):
            self._save_shards(engine, snapshot)
            return target
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in (VALUE, *MOMENTS)}
        # All ranks, once for each trainable tensor: ZeRO keeps values and moments in pieces.
        for name, kind, tensor in engine.state.gather(VALUE, *MOMENTS):
            self.watchdog.touch()
            if dist.rank() == 0:
                tensors[kind][name] = tensor
        if dist.rank() == 0:
            self._thread = threading.Thread(
                target=self._write_whole, args=(snapshot, tensors), name="saver", daemon=True
            )
            self._thread.start()
        return target

    def add_model(self, engine: TrainingEngine, step: int) -> None:
        """Add model/ to the checkpoint of `step`, which turns out to be the best (a collective).

        It was saved at a stop, before its evaluation. An adapter is there already.
        """
        if self.output.adapter_config is not None:
            return
        try:
            into = checkpoint.step_folder(self._run, step)
            self.output.save_final(engine, self.watchdog, into)
        except UserError as error:  # on all ranks alike: the disk is full
            say(f"{error}; the training goes on")

    def wait(self, seconds_to_compare: float | None = None) -> bool:
        """Wait until the last save is on the disk and the base is known to be the same, for that
        only so many seconds; whether the save succeeded (a collective)."""
        # At the store and not in a collective, which has a time-out that a slow disk may exceed.
        dist.once(partial(self._join, seconds_to_compare), "the saver")
        return not dist.max_floats(self._failure is not None)[0]

    def _join(self, seconds_to_compare: float | None) -> None:
        if self._thread is not None:
            self.watchdog.touch_during(self._thread.join)
        self._thread = None
        if self._whole is not None:
            self.watchdog.touch_during(partial(self._whole.wait, seconds_to_compare))

    def _sharded(self, engine: TrainingEngine) -> bool:
        """Whether the state stays in the ranks' pieces: full training under ZeRO."""
        return self.output.adapter_config is None and engine.stage > 0

    def _describe(self, engine: TrainingEngine, state: RunState) -> dict[str, Any]:
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
            **self._beginning(),
        }

    def _beginning(self) -> dict[str, Any]:
        if self._whole is None:
            return {}
        return {BEGAN_WITH: self._whole.began.as_json(), COMPARED: self._whole.compared}

    def _write_whole(self, snapshot: _Snapshot, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Write a checkpoint from gathered state, in the thread of rank 0."""
        step = snapshot.state.step
        try:
            folder = checkpoint.unfinished_folder(self._run, step)
            # An adapter file holds the fp32 values themselves, a model's what they are in its
            # dtype.
            in_adapter = self.output.adapter_config is not None
            files: Files = {}
            if in_adapter or snapshot.state.is_best:
                files = self.output.write_values(folder, tensors[VALUE])
            kinds = MOMENTS if in_adapter else (VALUE, *MOMENTS)
            held = {f"{name}.{kind}": t for kind in kinds for name, t in tensors[kind].items()}
            files[OPTIMIZER] = save_tensors(folder / OPTIMIZER, held)
            self._finish(folder, snapshot, files)
        except Exception as error:  # not even a defect of ours is worth a day's training
            log.exception("saving step %d has failed", step)
            self._give_up(step, error)

    def _save_shards(self, engine: TrainingEngine, snapshot: _Snapshot) -> None:
        """Write each rank's pieces, and on rank 0 also a model that is the best (a collective)."""
        step, name = snapshot.state.step, shard_name(dist.rank(), dist.world_size())
        folder = unfinished_name(checkpoint.step_folder(self._run, step))
        watchdog = self.watchdog
        files: Files = {}
        failures: list[OSError] = []
        if dist.rank() == 0:
            _catch(failures, lambda: checkpoint.unfinished_folder(self._run, step))
        dist.barrier()  # all ranks: the folder is there
        if not failures and not folder.is_dir():
            reason = "does not see it; full training needs output_dir on a shared disk"
            failures.append(OSError(0, f"rank {dist.rank()} {reason}", folder))
        if not failures:
            write = partial(save_tensors, folder / name, engine.state.pieces())
            _catch(failures, lambda: files.update({name: watchdog.touch_during(write)}))
        dist.meet("shards written")  # all ranks; disks differ, and a collective has a time-out
        if snapshot.state.is_best:
            write_model = partial(self.output.write_model, engine, folder, watchdog)
            _catch(failures, lambda: files.update(write_model()))
        # All ranks: what each has written, or why not.
        told = dist.gather((files, str(failures[0]) if failures else ""))
        failure = next((text for _, text in told if text), "")
        written = {name: sha256 for of_rank, _ in told for name, sha256 in of_rank.items()}

        def finish() -> None:
            try:
                if failure:
                    raise OSError(failure)
                self._finish(folder, snapshot, written)
            except OSError as error:
                self._give_up(step, error)

        dist.once(finish, "the checkpoint")

    def _finish(self, folder: Path, snapshot: _Snapshot, files: Files) -> None:
        state = snapshot.state
        rng = {name: t for of_rank in snapshot.rng for name, t in of_rank.items()}
        files[RNG] = save_tensors(folder / RNG, rng)
        target = checkpoint.finish(self._run, state.step, snapshot.description, files)
        self._failure, self._saved_step = None, state.step
        log.info("saved %s", target)
        try:
            checkpoint.tidy(self._run, state.step, state.best.step, self._keep)
        except OSError as error:
            say(f"step {state.step} is saved, but {error}")

    def _give_up(self, step: int, error: Exception) -> None:
        unfinished = unfinished_name(checkpoint.step_folder(self._run, step))
        shutil.rmtree(unfinished, ignore_errors=True)
        self._failure = f"{error}"
        say(
            f"step {step} is not saved: {error}; the checkpoints before it are kept and the "
            f"training goes on"
        )


def _catch(failures: list[OSError], action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        failures.append(error)


def _rng_state() -> dict[str, Tensor]:
    """The states of torch's generators on this rank, uint8, by their names in the file.

    Dropout is seeded per micro-batch, so nothing of ours draws from them; a library that does
    continues its sequence.
    """
    states = {f"rank_{dist.rank()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states[f"rank_{dist.rank()}.cuda"] = torch.cuda.get_rng_state()
    return states
