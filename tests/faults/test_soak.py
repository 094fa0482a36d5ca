"""A longer soak, by `make test-faults`: runs of all kinds, each disturbed in random ways until it
is through."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import Job

pytestmark = [pytest.mark.job, pytest.mark.soak]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_to_a_run_it_ends_as_if_nothing_had(
    small_job: list[str], tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    ranks, stage = chance.choice([1, 2, 3]), chance.choice([0, 1, 2, 3])
    options = [
        *small_job, "--lora.dropout", "0.1", "--deepspeed", f"ds_configs/zero{stage}.json",
        "--optim.max_steps", "40", "--optim.epochs", "99",
        "--save.every_steps", str(chance.choice([1, 2, 5])), "--save.keep", "2",
        "--data.eval_fraction", "0.1", "--eval.every_steps", "7", "--eval.sample_tokens", "3",
        "--log.every_steps", str(chance.choice([1, 3])),
    ]  # fmt: skip
    if chance.random() < 0.3:
        options += ["--method", "full", "--model.dtype", "bfloat16"]
    calm, run = tmp_path / "calm", tmp_path / "run"
    start = time.monotonic()
    Job([*options, "--output_dir", str(calm)], ranks).wait().ok()
    usual = time.monotonic() - start
    story = [f"seed {seed}: {ranks} ranks, ZeRO-{stage}"]
    for _ in range(8):
        job = Job([*options, "--output_dir", str(run)], ranks)
        time.sleep(chance.uniform(0.2, 1.0) * usual)
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        victims = chance.choice([None, [chance.randrange(ranks)]])
        job.send(number, victims).wait(timeout=90)
        story.append(f"{number.name} to {victims or 'all'}: {job.codes}")
    job = Job([*options, "--output_dir", str(run)], ranks).wait().ok()
    (name,) = (p.name for p in calm.glob("*/*.safetensors"))
    (a,), (b,) = (list(folder.glob(f"*/{name}")) for folder in (calm, run))
    x, y = load_file(a), load_file(b)
    assert all(torch.equal(x[k], y[k]) for k in x), story
    for name in ("samples.jsonl", "token_losses.jsonl"):
        assert (calm / name).read_text() == (run / name).read_text(), story
