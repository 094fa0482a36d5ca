"""The largest micro-batch before the first step, and the end of a run that is out of memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen_ds.data.batches import Part, StepSampler
from qwen_ds.errors import OutOfMemory
from qwen_ds.train import rehearsal
from qwen_ds.train.rehearsal import is_out_of_memory, largest_rows, memory_is_told
from tests.jobs import Job

REHEARSED = ["--batch.rehearse", "true"]
ADAPTER = "adapter/adapter_model.safetensors"


class Rows:
    """Token rows of which only the lengths are asked for."""

    pad_id = 0

    def __init__(self, lens: np.ndarray) -> None:
        self.lens = self.learnt = lens.astype(np.int32)
        self.parts = (Part(len(lens), 1.0),)

    def __len__(self) -> int:
        return len(self.lens)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(self.lens[row], np.int32), np.zeros(self.lens[row], np.int32)


@pytest.mark.parametrize(("world", "budget"), [(1, 2048), (8, 2048), (4, 600)])
def test_the_largest_micro_batch_of_any_rank_and_epoch_is_found(world: int, budget: int) -> None:
    """Within 2 % of the largest that a search through all steps finds, and never beyond it."""
    lens = np.random.default_rng(1).lognormal(5, 0.4, 900).clip(8, 700)
    of_rank = [StepSampler(Rows(lens), 64, 3, world, rank, budget) for rank in range(world)]
    steps = 3 * of_rank[0].steps_per_epoch
    found = [largest_rows(sampler, 0, steps)[0] for sampler in of_rank]
    chosen, width = found[0], of_rank[0].width(found[0])
    assert all((chosen == rows).all() for rows in found)
    assert all(sampler.width(chosen) == width for sampler in of_rank)
    assert width >= int(lens[chosen].max())
    size = len(chosen) * width
    windows = (s.window(*divmod(n, s.steps_per_epoch)) for s in of_rank for n in range(steps))
    largest = max(batch.ids_BT.numel() for window in windows for batch in window)
    assert 0.98 * largest <= size <= largest


@pytest.mark.parametrize("longest", [580, 640])
def test_a_single_row_and_several_rows_are_both_found(longest: int) -> None:
    lens = np.append(np.full(63, 200), longest)
    sampler = StepSampler(Rows(lens), 64, 3, 1, 0, 600)
    largest, other = largest_rows(sampler, 0, sampler.steps_per_epoch)
    assert other is not None and {len(largest) == 1, len(other) == 1} == {True, False}
    assert longest in lens[largest if len(largest) == 1 else other]
    assert sampler.size(other) <= sampler.size(largest)
    alike = StepSampler(Rows(np.full(63, 200)), 63, 3, 1, 0, 600)
    assert largest_rows(alike, 0, 1)[1] is None


def test_the_last_step_of_an_epoch_may_bring_the_single_row() -> None:
    """And a rank without any row, which runs as one, is no micro-batch of several."""
    lens = np.random.default_rng(1).lognormal(5, 0.4, 6409).clip(8, 700).astype(np.int32)
    largest, other = largest_rows(StepSampler(Rows(lens), 64, 3, 8, 0, 2048), 0, 101)
    assert len(largest) > 1 and other is not None and len(other) <= 1
    alone = StepSampler(Rows(np.array([600] * 3 + [590] * 3)), 3, 3, 2, 0, 600)
    largest, other = largest_rows(alone, 0, 2)
    assert len(largest) == 1 and other is None


@pytest.mark.parametrize("compiles", [False, True, "pieces"])
def test_what_is_compiled_twice_is_rehearsed_twice(
    compiles: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single row is compiled by itself: some step in the middle would wait for it."""
    rows, ran = Rows(np.append(np.full(63, 200), 600)), list[tuple[str, int]]()

    def loss_sum(ids_BT: torch.Tensor, *_: Any) -> torch.Tensor:
        ran.append(("forward", len(ids_BT)))
        return torch.ones(())

    engine = SimpleNamespace(
        train=lambda _: None,
        state=SimpleNamespace(make_moments=lambda: None),
        device=torch.device("cpu"),
        loss_sum=loss_sum,
        backward=lambda loss, last_of_step: ran.append(("backward", int(loss))),
    )
    session: Any = SimpleNamespace(
        engine=engine,
        recipe=SimpleNamespace(model=SimpleNamespace(compile=compiles)),
        saver=SimpleNamespace(watchdog=SimpleNamespace(at=lambda *_: None)),
        data=SimpleNamespace(train=rows, sampler=StepSampler(rows, 64, 3, 1, 0, 600)),
        observer=nullcontext(),
        start=(0,),
        steps=1,
    )
    monkeypatch.setattr(rehearsal.dist, "barrier", lambda: None)
    monkeypatch.setattr(rehearsal.dist, "max_floats", lambda *mine: list(mine))
    rehearsal.rehearse(session)
    forward, backward = ([n for name, n in ran if name == of] for of in ("forward", "backward"))
    assert backward == [0] * len(forward)
    assert len({n == 1 for n in forward}) == len(forward) == (2 if compiles else 1)


def trained_in(folder: Path) -> dict[str, torch.Tensor]:
    is_lora = (folder / ADAPTER).exists()
    return load_file(folder / (ADAPTER if is_lora else "model/model.safetensors"))


@pytest.mark.job
@pytest.mark.parametrize(
    ("method", "stage", "ranks", "compiles"),
    [
        ("lora", 0, 1, "false"),
        ("lora", 2, 2, "pieces"),
        ("lora", 3, 2, "pieces"),
        ("full", 1, 1, "false"),
        ("full", 3, 1, "false"),
    ],
)
def test_no_number_changes(
    job: Callable, small_job: list[str], tmp_path: Path, method: str, stage: int, ranks: int,
    compiles: str,
) -> None:  # fmt: skip
    """Dropout on: what is trained is the same bit for bit, and so are the lines of metrics."""
    options = [*small_job, "--deepspeed", f"ds_configs/zero{stage}.json", "--method", method]
    options += ["--lora.dropout", "0.1"] if method == "lora" else ["--model.dtype", "bfloat16"]
    options += ["--optim.max_steps", "3", "--model.compile", compiles]
    if compiles != "false":
        options += ["--batch.tokens_per_micro_batch", "180", "--batch.rows_per_step", "14"]
    plain, rehearsed = tmp_path / "plain", tmp_path / "rehearsed"
    job([*options, "--output_dir", str(plain)], ranks).ok()
    job([*options, *REHEARSED, "--output_dir", str(rehearsed)], ranks).ok()
    logged = (rehearsed / "logs" / "rank_0.log").read_text()
    assert "the largest micro-batch ran: " in logged
    assert ("the largest micro-batch of a single row ran: " in logged) == (compiles != "false")
    assert "the largest micro-batch ran: " not in (plain / "logs" / "rank_0.log").read_text()
    one, two = trained_in(plain), trained_in(rehearsed)
    assert all(torch.equal(one[name], two[name]) for name in one) and len(one) > 10
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (plain, rehearsed)
    ]
    for before, after in zip(*lines, strict=True):
        assert (before["loss"], before["grad_norm"]) == (after["loss"], after["grad_norm"])


@pytest.mark.job
def test_a_run_that_resumes_rehearses_and_ends_as_if_it_had_not(
    job: Callable, small_job: list[str], tmp_path: Path
) -> None:
    options = [*small_job, "--lora.dropout", "0.1", "--save.every_steps", "2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    job([*options, "--optim.max_steps", "4", "--output_dir", str(whole)]).ok()
    changes = ["--output_dir", str(halves), "--resume.allow_changes", "['optim.max_steps']"]
    job([*options, *changes, "--optim.max_steps", "2"]).ok()
    job([*options, *changes, *REHEARSED, "--optim.max_steps", "4"]).ok()
    one, two = trained_in(whole), trained_in(halves)
    assert all(torch.equal(one[name], two[name]) for name in one)


# launch/train.py with a loss that finds no memory on these ranks, at this call of the engine.
_FAILS = """
import os, runpy, sys, torch
from pathlib import Path
from qwen_ds.train.engine.engine import TrainingEngine
ranks, call = sys.argv.pop(1).split(","), int(sys.argv.pop(1))
loss_sum, calls = TrainingEngine.loss_sum, 0
def without_memory(self, *batch):
    global calls
    calls += 1
    if calls == call and os.environ["RANK"] in ranks:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    return loss_sum(self, *batch)
TrainingEngine.loss_sum = without_memory
runpy.run_path("launch/train.py", run_name="__main__")
"""


def failing(options: list[str], tmp_path: Path, ranks: str, call: int) -> Job:
    script = tmp_path / "fails.py"
    script.write_text(_FAILS)
    return Job([ranks, str(call), *options], 2, script).wait(60, mercy=15.0)


def said(ended: Job) -> list[str]:
    """The lines of its stderr that say an error, rank 1's first."""
    return sorted(re.findall(r"(?:\[rank \d+\] )?error: .*", ended.err))


@pytest.mark.job
@pytest.mark.parametrize(
    ("call", "more", "place"),
    [
        (1, REHEARSED, r"at step 0 \(trying the largest micro-batch, \d rows of \d+ tokens\)"),
        (5, [], r"at step [1-9] \(micro-batch \d of \d\)"),
    ],
)
def test_ranks_without_memory_end_with_one_line_each_that_says_what_fits(
    small_job: list[str], tmp_path: Path, call: int, more: list[str], place: str
) -> None:
    options = [*small_job, *more, "--output_dir", str(tmp_path / "run")]
    ended = failing(options, tmp_path, "0,1", call)
    assert ended.codes == [2, 2], ended.err
    second, first = said(ended)
    fits = "; expected --model.activation_checkpointing 2 (a memory peak of "
    told = rf"error: out of memory \(tried to allocate 2.00 GiB\) {place}{re.escape(fits)}.*"
    assert re.fullmatch(told, first)
    assert second.startswith(f"[rank 1] {first[: first.index(fits)]}")


@pytest.mark.job
def test_a_rank_that_alone_has_no_memory_is_named_by_the_others(
    small_job: list[str], tmp_path: Path
) -> None:
    options = [*small_job, *REHEARSED, "--output_dir", str(tmp_path / "run")]
    ended = failing(options, tmp_path, "1", 1)
    assert ended.codes == [1, 2]
    first, second = said(ended)
    assert first.startswith("[rank 1] error: out of memory")
    assert second.startswith("error: rank 1 on ") and "OutOfMemory: out of memory" in second


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_every_allocators_error_is_known(
    error: Exception, is_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_out_of_memory(error) == is_one
    monkeypatch.setattr(rehearsal, "remedy", lambda *of_run: "less")
    run: Any = SimpleNamespace(machine=SimpleNamespace(on_gpu=True))
    data: Any = SimpleNamespace(sizes=(9, 2, 64))
    expected = OutOfMemory if is_one else type(error)
    with pytest.raises(expected) as found, memory_is_told(run, data, lambda: "at step 3"):
        raise error
    if is_one:
        assert str(found.value) == "out of GPU memory at step 3; expected less"
