"""A save killed at each of its file operations in turn, half-way through where it writes a file.

The same command then resumes, and ends with the very files of a run that nobody disturbed.

The runs are forked: the real loop, saver, checkpoints and resume around the golden model, with
torch's AdamW in DeepSpeed's place (test_killed_jobs.py kills whole jobs, with DeepSpeed).
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen_ds.data.batches import Part, StepSampler
from qwen_ds.disk import weights
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.plan.run import Base
from qwen_ds.plan.shape import Shape
from qwen_ds.recipe import options as config
from qwen_ds.train import lora
from qwen_ds.train.engine.engine import StepResult, Totals
from qwen_ds.train.engine.state import VALUE, TrainableState
from qwen_ds.train.loop import train
from qwen_ds.train.loss import TrainingModel
from qwen_ds.train.session import assemble
from qwen_ds.train.setup import Data
from qwen_ds.train.survive import checkpoint, checkpoint_writer, resume
from qwen_ds.train.survive.checkpoint_writer import RunState, Saver
from qwen_ds.train.survive.result import Output
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
OPERATIONS = ("open", "fsync", "close", "chmod", "mkdir", "rename", "replace", "unlink", "rmdir")


class Rows:
    """Token rows in memory."""

    def __init__(self, count: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.lens = generator.integers(4, 12, count).astype(np.int32)
        self._ids = [generator.integers(0, 500, n).astype(np.int32) for n in self.lens]
        self.learnt = self.lens - 1  # target tokens: all but the first, which nothing predicts
        self.parts, self.pad_id, self.sha256 = [Part(count, 1.0)], 0, f"rows {seed}"

    def __len__(self) -> int:
        return len(self.lens)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return self._ids[row], self._ids[row]

    def source(self, row: int) -> str:
        return f"rows:{row}"


class PlainEngine:
    """The engine's interface on one rank, without DeepSpeed."""

    stage, overflows, device = 0, 0, torch.device("cpu")

    def __init__(self, model: TrainingModel) -> None:
        self.model = model
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        self.state = TrainableState(model.model, self._optimizer, 0, self.device)

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def loss_sum(self, ids_BT: Tensor, labels_BT: Tensor, places_P: Tensor | None = None) -> Tensor:
        return self.model(ids_BT, labels_BT)

    def token_losses(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return self.model(ids_BT, labels_BT, of_each_token=True)

    def backward(self, loss: Tensor, *, last_of_step: bool) -> None:
        loss.backward()

    def totals(self, loss_sums: list[Tensor], noted: float = 0.0) -> Totals:
        return Totals(float(sum(loss.item() for loss in loss_sums)), 0, noted, None)

    def step(self, grad_norm: float | None = None) -> StepResult:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepResult(norm)

    def trainable_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, _, tensor in self.state.gather(VALUE)}


def fresh_engine(model_dir: Path, recipe: config.Recipe) -> tuple[lora.PeftModel, Any]:
    model = QWenLMHeadModel.from_pretrained(model_dir)
    transformer, head = model.transformer, model.lm_head
    wrapped = lora.add_lora(model, recipe.lora, base="", seed=1)
    return wrapped, PlainEngine(TrainingModel(wrapped, transformer, head))


def take_one_step(model_dir: Path) -> None:
    """Let torch and peft set up what they need: forked runs inherit it, two thirds of their
    time."""
    _, engine = fresh_engine(model_dir, RECIPE)
    ids_BT = torch.arange(8)[None]
    engine.backward(engine.loss_sum(ids_BT, ids_BT), last_of_step=True)
    engine.step()


def run_once(model_dir: Path, run: Path, recipe: config.Recipe = RECIPE) -> None:
    """Resume the run that the folder holds, or begin one."""
    torch.set_num_threads(1)
    wrapped, engine = fresh_engine(model_dir, recipe)
    rows: Any = Rows(10, seed=1)
    data = Data(rows, Rows(5, seed=2), StepSampler(rows, 4, 7, 1, 0, 64), [])  # type: ignore[arg-type]
    run.mkdir(exist_ok=True)
    output = Output(run, model_dir, torch.float32, lora.config_of(wrapped))
    found = resume.newest_whole(run)
    watchdog = Watchdog(10, launched=False)
    identity = resume.identity(recipe, {}, data.sha256)
    if found:
        resume.restore(engine, found)
    recipe = replace(recipe, output_dir=str(run))
    saving = Saver(output, identity, 1, watchdog, found)
    base = Base.read(model_dir)
    decided: Any = SimpleNamespace(recipe=recipe, shape=Shape.of(base.config), base=base)
    train(assemble(decided, data, engine, saving))


class KillAt:
    """Makes operation `number` of save `save` (both from 1) the last one of this process.

    The operations are those of the saver's thread: calls of the system through `os`, and the two
    calls that write a file's bytes, Path.write_bytes and safetensors' save_file (in Rust, out of
    Python's sight). The process dies before a call of the system, and after half a file.
    """

    def __init__(self, number: int, save: int) -> None:
        self.number, self.save = number, save
        self.saves = self.operations = 0
        self.writing = False
        self.missed: list[str] = []
        run_thread = threading.Thread.run

        def run(thread: threading.Thread) -> None:
            self.saves += thread.name == "saver"
            run_thread(thread)

        threading.Thread.run = run  # type: ignore[method-assign]
        for name in OPERATIONS:
            setattr(os, name, self.killed_before(getattr(os, name)))
        write_bytes, save_file = Path.write_bytes, weights.save_file
        Path.write_bytes = self.killed_half_way(write_bytes, 0)  # type: ignore[method-assign]
        weights.save_file = self.killed_half_way(save_file, 1)
        sys.addaudithook(self.audit)

    def counts(self) -> bool:
        """Whether an operation of the calling thread counts."""
        return threading.current_thread().name == "saver" and self.saves == self.save

    def is_last(self) -> bool:
        self.operations += 1
        return self.operations == self.number

    def killed_before(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if self.counts() and self.is_last():
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return operation

    def killed_half_way(self, real: Callable[..., Any], at: int) -> Callable[..., Any]:
        """`at`: the position of the path among the arguments."""

        def operation(*args: Any, **kwargs: Any) -> Any:
            if not self.counts():
                return real(*args, **kwargs)
            self.writing = True
            result = real(*args, **kwargs)
            self.writing = False
            if self.is_last():
                os.truncate(args[at], Path(args[at]).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return operation

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Note files that are opened for writing in another way than through the two calls."""
        if event == "open" and not self.writing and self.counts():
            path, mode, flags = args
            if flags & (os.O_WRONLY | os.O_RDWR) and not str(path).endswith(".log"):
                self.missed.append(f"{path} {mode}")

    def report(self) -> None:
        """Print the number of operations; every file's bytes must have gone through one of them."""
        assert not self.missed, self.missed
        print(self.operations, flush=True)


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


def result(run: Path) -> tuple[bytes, str, list[dict[str, Any]], list[str]]:
    """Adapter, losses of tokens, metrics that depend on neither clock nor process, and the names in
    the folder."""
    timed = (
        "seconds", "tokens_per_second", "tokens_per_second_per_rank", "learnt_tokens_per_second",
        "memory_gb",
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = sorted(str(p.relative_to(run)) for p in run.rglob("*") if "tensorboard" not in p.parts)
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    losses = (run / "token_losses.jsonl").read_text()
    return (
        adapter,
        losses,
        [{k: v for k, v in line.items() if k not in timed} for line in lines],
        names,
    )


@pytest.fixture
def inherited(small_dir: Path) -> Iterator[None]:
    """What forked runs inherit: torch and peft set up, and a heap that no run walks and so copies
    when it collects garbage before its first step."""
    take_one_step(small_dir)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.job
@pytest.mark.usefixtures("inherited")
@pytest.mark.parametrize(("save", "every"), [(1, 8), (3, 1)])
def test_a_kill_at_every_file_operation_of_a_save_loses_nothing(
    small_dir: Path, tmp_path: Path, save: int, every: int
) -> None:
    """Every operation of a save that also moves `best` and deletes an old checkpoint, and a sample
    of those of the first save, which has nothing before it."""
    log, calm, before = tmp_path / "log", tmp_path / "calm", tmp_path / "before"
    assert in_child(lambda: run_once(small_dir, calm), log) == 0, log.read_text()
    expected = result(calm)
    if save == 1:
        before.mkdir()
    else:  # the folder when the save begins: a run that resumes from it makes that save first
        died = in_child(lambda: (KillAt(1, save), run_once(small_dir, before)), log)
        assert died == signal.SIGKILL, log.read_text()

    def disturbed(number: int, run: Path) -> int:
        shutil.copytree(before, run)

        def action() -> None:
            kill = KillAt(number, 1)
            run_once(small_dir, run)
            kill.report()

        return in_child(action, log)

    assert disturbed(0, tmp_path / "counting") == 0, log.read_text()
    operations = int(log.read_text().split()[-1])
    assert operations > 50, "files, folders, state, pointers"
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
        real = checkpoint_writer.save_tensors

        def slow(path: Path, tensors: dict[str, Tensor]) -> str:
            ends, metrics = time.monotonic() + 60, run / "metrics.jsonl"
            while "step_000002" in str(path) and '"step": 4' not in metrics.read_text():
                assert time.monotonic() < ends, "the training waits for the disk"
                time.sleep(0.01)
            return real(path, tensors)

        checkpoint_writer.save_tensors = slow  # type: ignore[assignment]
        run_once(small_dir, run, replace(RECIPE, save=config.SaveOptions(every_steps=6)))

    assert in_child(action, log) == 0, log.read_text()
    assert "the training waits" not in log.read_text()
    found = checkpoint.newest(run)
    assert found is not None and found.step == checkpoint.steps_saved(run)[-1], "all are whole"
    assert (run / "checkpoints" / "step_000002").is_dir()


@pytest.mark.job
def test_a_save_needs_little_more_than_the_state_itself(tmp_path: Path) -> None:
    """Values and moments are three times the adapter's fp32 size; the bar is 3.2 times, with
    writing and hashing."""
    log = tmp_path / "log"

    def action() -> None:
        torch.set_num_threads(1)
        model = torch.nn.ModuleDict(
            {f"m{i}": torch.nn.Linear(1024, 512, bias=False) for i in range(64)}
        )
        size = sum(p.numel() * 4 for p in model.parameters())
        engine: Any = PlainEngine(SimpleNamespace(model=model, parameters=model.parameters))  # type: ignore[arg-type]
        engine.state.steps, engine.state.make_moments()
        output = Output(
            tmp_path / "run", tmp_path, torch.float32, lora.LoraConfig(r=2, target_modules=["m0"])
        )
        saving = Saver(output, {}, 1, Watchdog(10, launched=False), None)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        saving.save(engine, RunState(1, 10, {}, {}))
        assert saving.wait()
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
