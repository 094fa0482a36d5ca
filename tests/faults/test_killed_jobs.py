"""Whole jobs that are killed, stopped, starved and moved: the same command goes on, and nothing is
lost on the way."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen_ds.train.survive import checkpoint
from tests.jobs import ROOT, SCRIPT, Job, shared_memory, shared_memory_left

pytestmark = pytest.mark.job
TIMED = (
    "seconds",
    "tokens_per_second",
    "tokens_per_second_per_rank",
    "learnt_tokens_per_second",
    "memory_gb",
)


@pytest.fixture
def options(small_job: list[str]) -> list[str]:
    """20 steps with dropout, a checkpoint every second one, one micro-batch a step and rank."""
    return [
        *small_job, "--lora.dropout", "0.1", "--optim.max_steps", "20", "--save.every_steps", "2",
        "--batch.tokens_per_micro_batch", "2000", "--save.keep", "3",
    ]  # fmt: skip


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def adapter(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    x, y = adapter(a), adapter(b)
    return (
        x.keys() == y.keys()
        and all(torch.equal(x[k], y[k]) for k in x)
        and metrics(a) == metrics(b)
    )


def saved(run: Path) -> set[str]:
    return {p.name for p in (run / "checkpoints").glob("step_*")}


def until_saved(job: Job, run: Path) -> Job:
    """Until there is a checkpoint that was not there."""
    before = saved(run)
    return job.until(lambda: bool(saved(run) - before))


@pytest.mark.parametrize(("stage", "steps"), [(2, 100), (3, 40)])
def test_five_kills_at_random_instants_change_no_bit(
    options: list[str], tmp_path: Path, stage: int, steps: int
) -> None:
    """SIGKILL to all ranks: two of the five come while the job starts, the others while it trains
    or saves."""
    options = [
        *options,
        "--deepspeed",
        f"ds_configs/zero{stage}.json",
        "--optim.max_steps",
        str(steps),
    ]
    options += ["--optim.epochs", "99"]
    calm, run = tmp_path / "calm", tmp_path / "run"
    start = time.monotonic()
    job = until_saved(Job([*options, "--output_dir", str(calm)], 2), calm)
    start_up = time.monotonic() - start
    job.wait().ok()
    instants = random.Random(stage)
    for kill in range(5):
        job = Job([*options, "--output_dir", str(run)], 2)
        if kill % 2:
            time.sleep(instants.uniform(0, start_up))
        else:
            until_saved(job, run)
            time.sleep(instants.uniform(0, 0.3))
        assert job.send(signal.SIGKILL).wait().codes == [-9, -9], (
            "the run was over before it was killed"
        )
    last = Job([*options, "--output_dir", str(run)], 2).wait().ok()
    assert "resumed" in last.out and same(calm, run)
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert left == [f"step_{steps - before:06d}" for before in (4, 2, 0)], (
        "nothing unfinished is left"
    )


def test_a_signal_to_one_rank_saves_on_all_at_the_same_step(
    options: list[str], tmp_path: Path
) -> None:
    """SIGTERM twice in a row to rank 1 only, and later SIGINT to both: exit code 3 each time, and
    no bit changes."""
    calm, run = tmp_path / "calm", tmp_path / "run"
    shared = shared_memory()
    Job([*options, "--output_dir", str(calm)], 2).wait().ok()
    job = until_saved(Job([*options, "--output_dir", str(run)], 2), run)
    job.send(signal.SIGTERM, [1])
    time.sleep(0.05)
    job.send(signal.SIGTERM, [1]).wait()
    assert job.codes == [3, 3] and "stopped by SIGTERM after step" in job.out, job.err[-2000:]
    step = json.loads(
        (run / "checkpoints" / (run / "latest").read_text().strip() / "state.json").read_text()
    )["step"]
    assert f"after step {step}, which is saved" in job.out and len(metrics(run)) == step
    job = until_saved(Job([*options, "--output_dir", str(run)], 2), run)
    assert job.send(signal.SIGINT).wait().codes == [3, 3]
    Job([*options, "--output_dir", str(run)], 2).wait().ok()
    assert same(calm, run)
    assert not shared_memory_left(shared)


def test_the_evaluation_that_a_signal_put_off_is_made_up_for(
    options: list[str], tmp_path: Path
) -> None:
    """Evaluation after every step, so that whichever step the signal stops at owes one."""
    evaluation = [
        "--data.eval_fraction",
        "0.1",
        "--eval.every_steps",
        "1",
        "--eval.sample_tokens",
        "4",
    ]
    options = [*options, *evaluation, "--optim.max_steps", "8"]
    calm, run = tmp_path / "calm", tmp_path / "run"
    Job([*options, "--output_dir", str(calm)], 1).wait().ok()
    job = until_saved(Job([*options, "--output_dir", str(run)], 1), run)
    assert job.send(signal.SIGUSR1).wait().codes == [3]
    newest = run / "checkpoints" / (run / "latest").read_text().strip()
    assert json.loads((newest / "state.json").read_text())["evaluated"] is False
    Job([*options, "--output_dir", str(run)], 1).wait().ok()
    assert same(calm, run)
    for name in ("samples.jsonl", "token_losses.jsonl"):
        assert (calm / name).read_text() == (run / name).read_text(), name
    assert (calm / "best").read_text() == (run / "best").read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_takes_the_others_with_it_and_is_named(
    options: list[str], tmp_path: Path, victim: int
) -> None:
    run = tmp_path / "run"
    job = until_saved(
        Job(
            [
                *options,
                "--optim.max_steps",
                "5000",
                "--optim.epochs",
                "999",
                "--output_dir",
                str(run),
            ],
            2,
        ),
        run,
    )
    killed = time.monotonic()
    job.send(signal.SIGKILL, [victim]).wait(timeout=60)
    assert time.monotonic() - killed < 60
    assert job.codes[victim] == -9 and job.codes[1 - victim] == 1
    (line,) = [text for text in job.err.splitlines() if "error: rank" in text]
    assert (
        f"rank {victim} on " in line
        and "is gone at step" in line
        and "the last line of its log: " in line
    )


STUCK = """
import runpy, sys, time
from qwen_ds import dist
from qwen_ds.data import batches
window = batches.StepSampler.window
def hang(self, epoch, step):
    if step == 3 and dist.rank() == 1:
        time.sleep(1000)
    return window(self, epoch, step)
batches.StepSampler.window = hang
runpy.run_path(%r, run_name="__main__")
"""


def test_a_stuck_collective_ends_with_the_step_and_the_rank_that_is_behind(
    options: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK % str(SCRIPT))
    arguments = [
        *options,
        "--distributed.timeout_minutes",
        "0.1",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    job = Job(arguments, 2, script).wait(timeout=90)
    assert job.codes == [1, 1]
    line = next(text for text in job.err.splitlines() if "no rank has moved" in text)
    assert "rank 1 on " in line and "is behind, at step 4 (reading the batch)" in line
    assert "while rank 0 is at step 4 (" in line


def test_ranks_end_when_their_launcher_disappears(options: list[str], tmp_path: Path) -> None:
    """The launcher is killed so that it can forward nothing."""
    run = tmp_path / "run"
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    arguments = [
        *options,
        "--optim.max_steps",
        "5000",
        "--optim.epochs",
        "999",
        "--output_dir",
        str(run),
    ]
    launcher = (
        "import subprocess, sys; "
        "p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, sys.executable, str(SCRIPT), *arguments],
        env=os.environ | environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    rank = int(process.stdout.readline())
    ends = time.monotonic() + 120
    while not saved(run):
        assert time.monotonic() < ends and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    ends = time.monotonic() + 60
    while (
        Path(f"/proc/{rank}/stat").exists()
        and Path(f"/proc/{rank}/stat").read_text().split()[2] != "Z"
    ):
        assert time.monotonic() < ends, "the rank goes on without its launcher"
        time.sleep(0.1)
    assert "the launcher is gone" in (run / "logs" / "rank_0.log").read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_the_save_and_not_the_training(
    options: list[str], small_disk: Path, tmp_path: Path
) -> None:
    """Room for a few checkpoints of a quarter of a megabyte; once there is room again, saving works
    again."""
    calm, run = tmp_path / "calm", small_disk / "run"
    options = [*options, "--save.keep", "32"]
    Job([*options, "--output_dir", str(calm)], 2).wait().ok()
    job = Job([*options, "--output_dir", str(run)], 2).wait()
    line = next(text for text in job.out.splitlines() if "is not saved" in text)
    assert "No space left on device" in line and "the training goes on" in line
    complete = [p for p in (run / "checkpoints").iterdir()]
    assert complete and all((p / "state.json").is_file() for p in complete), (
        "the old ones are kept, whole"
    )
    assert "step 20 of 20" in (run / "logs" / "rank_1.log").read_text(), (
        "the training went on to its end"
    )
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    again = Job([*options, "--output_dir", str(run)], 2).wait().ok()
    assert "resumed" in again.out or "finished" in again.out
    assert same(calm, run)


def test_the_world_may_change_three_times(small_job: list[str], tmp_path: Path) -> None:
    """2 ranks under ZeRO-3, then 1 under ZeRO-2, 2 under ZeRO-2, 3 under ZeRO-3: the adapter of an
    undisturbed run, within rounding. 14,976 parameters don't divide evenly over three ranks. No
    dropout: it depends on the ranks."""
    calm, run = tmp_path / "calm", tmp_path / "run"
    longer = ["--optim.max_steps", "12", "--save.every_steps", "3"]
    Job([*small_job, *longer, "--output_dir", str(calm)], 1).wait().ok()
    for ranks, stage, steps in ((2, 3, 3), (1, 2, 6), (2, 2, 9), (3, 3, 12)):
        world = [
            "--deepspeed",
            f"ds_configs/zero{stage}.json",
            "--resume.allow_changes",
            "deepspeed",
            "optim.max_steps",
        ]
        arguments = [
            *small_job,
            *longer,
            *world,
            "--optim.max_steps",
            str(steps),
            "--output_dir",
            str(run),
        ]
        job = Job(arguments, ranks).wait().ok()
        assert steps == 3 or f"step {steps - 3} of {steps}" in job.out
    x, y = adapter(calm), adapter(run)
    change = {k: x[k] for k in x if "lora_B" in k}  # B begins at zero
    assert max(float((x[k] - y[k]).norm() / x[k].norm()) for k in change) < 1e-4
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))


def test_damage_is_passed_over_and_made_good(options: list[str], tmp_path: Path) -> None:
    """A flipped byte in the newest checkpoint, half a file in the one before, `latest` gone: the
    job goes on from the third, and ends as if nothing had been."""
    calm, run = tmp_path / "calm", tmp_path / "run"
    Job([*options, "--output_dir", str(calm)], 1).wait().ok()
    shutil.copytree(calm, run)
    newest, before = (
        run / "checkpoints" / f"step_{step:06d}" / "optimizer.safetensors" for step in (20, 18)
    )
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 64
    newest.write_bytes(data)
    before.write_bytes(before.read_bytes()[:1000])
    (run / "latest").unlink()
    (run / "report.html").unlink()
    job = Job([*options, "--output_dir", str(run)], 1).wait().ok()
    assert job.out.count("is passed over") == 2 and "step_000016: step 16 of 20" in job.out
    assert same(calm, run) and (run / "latest").read_text() == "step_000020\n"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_full_training_resumes_bit_for_bit_in_the_same_world(
    small_job: list[str], tmp_path: Path, stage: int
) -> None:
    calm, run = tmp_path / "calm", tmp_path / "run"
    options = [
        *small_job, "--method", "full", "--model.dtype", "bfloat16" if stage else "float32",
        "--deepspeed", f"ds_configs/zero{stage}.json",
        "--optim.max_steps", "6", "--save.every_steps", "2",
    ]  # fmt: skip
    Job([*options, "--output_dir", str(calm)], 2).wait().ok()
    until_saved(Job([*options, "--output_dir", str(run)], 2), run).send(signal.SIGKILL).wait()
    first = run / "checkpoints" / "step_000002"
    names = {p.name for p in first.iterdir()}
    pieces = {"shard_00000_of_00002.safetensors", "shard_00001_of_00002.safetensors"}
    assert {"state.json"} | (pieces if stage else set()) <= names and "model" not in names
    if stage == 2:
        other = Job([*options, "--output_dir", str(run)], 1).wait()
        assert other.codes == [2] and "of 2 ranks under ZeRO-2; expected the same now" in other.err
        # What the second rank alone reads is damaged: both ranks pass it over.
        newest = (
            checkpoint.step_folder(run, checkpoint.steps_saved(run)[-1])
            / "shard_00001_of_00002.safetensors"
        )
        newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    Job([*options, "--output_dir", str(run)], 2).wait().ok()
    x, y = (load_file(folder / "model" / "model.safetensors") for folder in (calm, run))
    assert all(torch.equal(x[k], y[k]) for k in x) and metrics(calm) == metrics(run)


def test_early_stopping_keeps_the_best(small_job: list[str], tmp_path: Path) -> None:
    """A learning rate of zero: the second and third evaluation are no better than the first."""
    run = tmp_path / "run"
    options = [
        "--data.eval_fraction",
        "0.2",
        "--eval.every_steps",
        "2",
        "--eval.patience",
        "2",
        "--optim.lr",
        "0",
    ]
    job = Job([*small_job, *options, "--output_dir", str(run)], 1).wait().ok()
    assert "stopped early" in job.out and (run / "best").read_text() == "step_000002\n"
    assert [line["step"] for line in metrics(run) if "eval_loss" in line] == [2, 4, 6]
    assert max(line["step"] for line in metrics(run)) == 6
    again = Job([*small_job, *options, "--output_dir", str(run)], 1).wait().ok()
    assert "finished run of 6 steps" in again.out


def test_fp16_goes_on_with_its_loss_scale(
    job: Callable, small_job: list[str], tmp_path: Path
) -> None:
    """The scale and its history are state, too: dynamic scaling begins at 65,536 and halves at each
    overflow."""
    calm, run = tmp_path / "calm", tmp_path / "run"
    options = [*small_job, "--model.dtype", "float16", "--save.every_steps", "2"]
    job([*options, "--output_dir", str(calm)], 2).ok()
    until_saved(Job([*options, "--output_dir", str(run)], 2), run).send(signal.SIGKILL).wait()
    job([*options, "--output_dir", str(run)], 2).ok()
    assert same(calm, run)
    state = json.loads((run / "checkpoints" / "step_000010" / "state.json").read_text())
    assert (
        state["loss_scaler"]["cur_scale"] >= 1
        and state["optimizer_steps"] + state["overflows"] == 10
    )
