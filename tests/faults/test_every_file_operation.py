"""A save is killed at each of its file operations in turn, half-way through where the operation is a write: the same
command then goes on, and ends with the very files of a run that nobody disturbed.

The runs are forked: the real loop, saver, checkpoints and resume around the golden model, with torch's AdamW in
DeepSpeed's place (what DeepSpeed adds is killed as whole jobs in test_killed_jobs.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen_ds.data.batches import Part, StepSampler
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.recipe import options as config
from qwen_ds.train import lora
from qwen_ds.train.engine.engine import StepResult
from qwen_ds.train.engine.state import VALUE, TrainableState
from qwen_ds.train.loop import train
from qwen_ds.train.loss import TrainingModel
from qwen_ds.train.setup import Data
from qwen_ds.train.survive import checkpoint, resume
from qwen_ds.train.survive.result import Output
from qwen_ds.train.survive.saver import RunState, Saver
from qwen_ds.train.survive.watchdog import Watchdog

RECIPE = config.Recipe(
    model=config.ModelOptions(dtype="float32"),
    lora=config.LoraOptions(r=2, dropout=0.1),
    optim=config.OptimOptions(lr=1e-3, max_steps=6, epochs=9),
    batch=config.BatchOptions(rows_per_step=4),
    log=config.LogOptions(every_steps=2),
    eval=config.EvalOptions(every_steps=2, samples=0),
    save=config.SaveOptions(every_steps=3, keep=1),
)
OPERATIONS = ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir")


class Rows:
    """Token rows in memory."""

    def __init__(self, count: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.lens = generator.integers(4, 12, count).astype(np.int32)
        self._ids = [generator.integers(0, 500, n).astype(np.int32) for n in self.lens]
        self.parts, self.pad_id, self.sha256 = [Part(count, 1.0)], 0, f"rows {seed}"

    def __len__(self) -> int:
        return len(self.lens)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return self._ids[row], self._ids[row]

    def source(self, row: int) -> str:
        return f"rows:{row}"


class PlainEngine:
    """The engine's interface on one rank, without DeepSpeed."""

    stage, uses_loss_scale, overflows, device = 0, False, 0, torch.device("cpu")

    def __init__(self, model: TrainingModel) -> None:
        self.model = model
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        self.state = TrainableState(model.model, self._optimizer, 0, self.device)

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def loss_sum(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return self.model(ids_BT, labels_BT)

    def backward(self, loss: Tensor, *, last_of_step: bool) -> None:
        loss.backward()

    def step(self) -> StepResult:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepResult(norm, applied=True)

    def trainable_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, _, tensor in self.state.gather(VALUE)}


def fresh_engine(model_dir: Path, recipe: config.Recipe) -> tuple[lora.PeftModel, Any]:
    model = QWenLMHeadModel.from_pretrained(model_dir)
    transformer, head = model.transformer, model.lm_head
    wrapped = lora.add_lora(model, recipe.lora, base="", seed=1)
    return wrapped, PlainEngine(TrainingModel(wrapped, transformer, head))


def take_one_step(model_dir: Path) -> None:
    """What torch and peft set up at their first use, two thirds of a run's time, is then inherited by forked ones."""
    _, engine = fresh_engine(model_dir, RECIPE)
    ids_BT = torch.arange(8)[None]
    engine.backward(engine.loss_sum(ids_BT, ids_BT), last_of_step=True)
    engine.step()


def run_once(model_dir: Path, run: Path, recipe: config.Recipe = RECIPE) -> None:
    """The same command again: go on from what the folder holds, or begin."""
    torch.set_num_threads(1)
    wrapped, engine = fresh_engine(model_dir, recipe)
    rows: Any = Rows(10, seed=1)
    data = Data(rows, Rows(5, seed=2), StepSampler(rows, 4, 7, 1, 0, 64))  # type: ignore[arg-type]
    run.mkdir(exist_ok=True)
    output = Output(run, model_dir, torch.float32, lora.config_of(wrapped))
    found = resume.find(run)
    watchdog = Watchdog(10, launched=False)
    identity = resume.identity(recipe, {}, data.sha256)
    if found:
        resume.restore(engine, found)
    recipe = replace(recipe, output_dir=str(run))
    train(
        recipe, data, engine, Saver(output, identity, 1, watchdog, found), output, watchdog, found
    )


def kill_at(number: int, save: int) -> Callable[[], None]:
    """Patch the file operations of the saver's thread: operation `number` of save `save` (both from 1) is the last one
    that this process makes. Returns a function that writes how many operations there were."""
    counts = {"save": 0, "operation": 0}
    run_thread = threading.Thread.run

    def run(self: threading.Thread) -> None:
        if self.name == "saver":
            counts["save"] += 1
        run_thread(self)

    threading.Thread.run = run  # type: ignore[method-assign]

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name != "saver" or counts["save"] != save:
                return real(*args, **kwargs)
            counts["operation"] += 1
            if counts["operation"] == number:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        setattr(os, name, counted(name, getattr(os, name)))
    return lambda: print(counts["operation"], flush=True)


def in_child(action: Callable[[], object], out: Path) -> int:
    """Run `action` in a forked process; its exit status (os.waitpid's)."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest's are not these
        os.environ.update(
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
        )
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def result(run: Path) -> tuple[bytes, list[dict[str, Any]], list[str]]:
    """Adapter, metrics without what depends on the clock and the process, and what lies in the folder."""
    timed = (
        "seconds",
        "tokens_per_second",
        "tokens_per_second_per_rank",
        "learnt_tokens_per_second",
        "memory_gb",
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = sorted(str(p.relative_to(run)) for p in run.rglob("*") if "tensorboard" not in p.parts)
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    return adapter, [{k: v for k, v in line.items() if k not in timed} for line in lines], names


@pytest.mark.job
@pytest.mark.parametrize(("save", "every"), [(1, 8), (3, 1)])
def test_a_kill_at_every_file_operation_of_a_save_loses_nothing(
    small_dir: Path, tmp_path: Path, save: int, every: int
) -> None:
    """Every operation of a save that also moves `best` and deletes what is too old; a sample of those of the first
    save, which has nothing before it."""
    take_one_step(small_dir)
    log, calm, before = tmp_path / "log", tmp_path / "calm", tmp_path / "before"
    assert in_child(lambda: run_once(small_dir, calm), log) == 0, log.read_text()
    expected = result(calm)
    if save == 1:
        before.mkdir()
    else:  # what lies there when the save begins; a run that goes on from it makes that save as its first
        assert (
            in_child(lambda: (kill_at(1, save), run_once(small_dir, before)), log) == signal.SIGKILL
        )

    def disturbed(number: int, run: Path) -> int:
        shutil.copytree(before, run)

        def action() -> None:
            tell = kill_at(number, 1)
            run_once(small_dir, run)
            tell()

        return in_child(action, log)

    assert disturbed(0, tmp_path / "counting") == 0, log.read_text()
    operations = int(log.read_text().split()[-1])
    assert operations > 30, "files, folders, state, pointers"
    for number in range(1, operations + 1, every):
        run = tmp_path / f"killed_{number}"
        assert disturbed(number, run) == signal.SIGKILL, f"operation {number}: {log.read_text()}"
        if save > 1:
            at_hand = list((run / "checkpoints").glob("step_*"))
            assert at_hand, f"operation {number}: less than the last complete checkpoint is left"
        assert in_child(lambda run=run: run_once(small_dir, run), log) == 0, (
            f"operation {number}: {log.read_text()}"
        )
        assert result(run) == expected, f"operation {number}"
        shutil.rmtree(run)


@pytest.mark.job
def test_the_training_goes_on_while_the_disk_is_slow(small_dir: Path, tmp_path: Path) -> None:
    """The first save is not let through until the metrics of a later step are there."""
    run, log = tmp_path / "run", tmp_path / "log"

    def action() -> None:
        real = checkpoint.write_tensors

        def slow(path: Path, tensors: dict[str, Tensor]) -> str:
            ends = time.monotonic() + 60
            while '"step": 4' not in (run / "metrics.jsonl").read_text() and "step_000002" in str(
                path
            ):
                assert time.monotonic() < ends, "the training waits for the disk"
                time.sleep(0.01)
            return real(path, tensors)

        checkpoint.write_tensors = slow  # type: ignore[assignment]
        run_once(small_dir, run, replace(RECIPE, save=config.SaveOptions(every_steps=6)))

    assert in_child(action, log) == 0, log.read_text()
    assert "the training waits" not in log.read_text()
    assert checkpoint.newest(run).remarks == [] and (run / "checkpoints" / "step_000002").is_dir()


@pytest.mark.job
def test_a_save_needs_little_more_than_the_state_itself(tmp_path: Path) -> None:
    """Values and moments are three times the adapter's fp32 size; the bar is 3.2 times, with writing and hashing."""
    log = tmp_path / "log"

    def action() -> None:
        torch.set_num_threads(1)
        model = torch.nn.ModuleDict(
            {f"m{i}": torch.nn.Linear(1024, 512, bias=False) for i in range(64)}
        )
        size = sum(p.numel() * 4 for p in model.parameters())
        engine: Any = PlainEngine(SimpleNamespace(model=model, parameters=model.parameters))  # type: ignore[arg-type]
        engine.state.steps, engine.state._make_moments()
        output = Output(
            tmp_path / "run", tmp_path, torch.float32, lora.LoraConfig(r=2, target_modules=["m0"])
        )
        saver = Saver(output, {}, 1, Watchdog(10, launched=False), None)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        saver.save(engine, RunState(1, 10, {}, {}))
        assert saver.wait()
        grown = memory("VmHWM") - before
        assert grown < 3.2 * size, f"{grown / size:.2f} times"
        assert grown > 2.9 * size, f"{grown / size:.2f} times: that was not measured"

    assert in_child(action, log) == 0, log.read_text()


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    line = next(
        text
        for text in Path("/proc/self/status").read_text().splitlines()
        if text.startswith(field)
    )
    return int(line.split()[1]) * 1024
