"""A gradient that is not finite never reaches the weights, whatever DeepSpeed would do with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# One rank, one good step, then one whose loss is finite and whose gradient is not: sqrt at 0.
_SCRIPT = """
import sys
from pathlib import Path
import torch
from qwen_ds.recipe.options import LoraOptions, ModelOptions, Recipe
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.train import lora
from qwen_ds.plan import deepspeed_json as ds_config
from qwen_ds.train.engine import engine
from qwen_ds.train.loss import TrainingModel

stage = int(sys.argv[2])
recipe = Recipe(model=ModelOptions(dtype="float32"))
engine.start_process_group(engine.choose_device("cpu"), 1)
resolved = ds_config.resolve({"zero_optimization": {"stage": stage}}, recipe, frozenset(), hidden_size=64, world=1)
with engine.partitioned_loading(resolved, torch.float32):
    model = QWenLMHeadModel.from_pretrained(sys.argv[1])
    wrapped = lora.add_lora(model, LoraOptions(dropout=0.0), base="", seed=1)
trained = engine.Engine(TrainingModel(wrapped, model.transformer, model.lm_head), recipe.optim, resolved)
ids = torch.arange(16)[None]

def step(loss):
    trained.backward(loss, last_of_step=True)
    return trained.step()

assert step(trained.loss_sum(ids, ids)).applied
before = trained.trainable_tensors()
loss = trained.loss_sum(ids, ids)
loss = loss + (loss.detach() - loss).clamp(min=0).sqrt()
assert torch.isfinite(loss)
result = step(loss)
after = trained.trainable_tensors()
assert not result.applied, result
assert all(torch.equal(before[k], after[k]) for k in before) and len(before) > 10
assert step(trained.loss_sum(ids, ids)).applied, "the next step is as if nothing had been"
engine.stop_process_group()
print("kept")
"""


@pytest.mark.job
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(
    small_dir: Path, stage: int
) -> None:
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    }
    command = [sys.executable, "-c", _SCRIPT, str(small_dir), str(stage)]
    run = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0 and "kept" in run.stdout, run.stderr[-3000:]
