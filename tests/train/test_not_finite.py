"""A loss or gradient that is not finite never reaches the weights, and the rows are named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qwen_ds import dist
from qwen_ds.errors import UserError
from qwen_ds.train.not_finite import NotFinite, bad_alone, raise_not_finite, stop_not_finite

# One rank, one good step, then one whose loss is finite and whose gradient is not: sqrt at 0.
_SCRIPT = """
import sys
from pathlib import Path
import torch
from qwen_ds.recipe.options import LoraOptions, ModelOptions, Recipe
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.train import lora
from qwen_ds.plan import deepspeed_json as ds_config
from qwen_ds.machine import choose_device
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.engine.loading import partitioned_loading
from qwen_ds.train.engine.start import start_process_group, stop_process_group
from qwen_ds.train.loss import TrainingModel

stage = int(sys.argv[2])
recipe = Recipe(model=ModelOptions(dtype="float32"))
start_process_group(choose_device("cpu"), 1)
config = {"zero_optimization": {"stage": stage}}
resolved = ds_config.resolve(config, recipe, frozenset(), hidden_size=64, world=1)
with partitioned_loading(resolved, torch.float32):
    model = QWenLMHeadModel.from_pretrained(sys.argv[1])
    wrapped = lora.add_lora(model, LoraOptions(dropout=0.0), base="", seed=1)
training = TrainingModel(wrapped, model.transformer, model.lm_head)
trained = TrainingEngine(training, recipe.optim, resolved)
ids = torch.arange(16)[None]

def step(loss):
    trained.backward(loss, last_of_step=True)
    return trained.step()

assert not step(trained.loss_sum(ids, ids)).not_finite
before = trained.trainable_tensors()
loss = trained.loss_sum(ids, ids)
loss = loss + (loss.detach() - loss).clamp(min=0).sqrt()
assert torch.isfinite(loss)
result = step(loss)
after = trained.trainable_tensors()
assert result.not_finite == f"gradient norm ({result.grad_norm})", result
assert all(torch.equal(before[k], after[k]) for k in before) and len(before) > 10
assert not step(trained.loss_sum(ids, ids)).not_finite, "the next step is as usual"
stop_process_group()
print("kept")
"""


@pytest.mark.job
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(
    small_dir: Path, stage: int
) -> None:
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    environment = {k: v for k, v in os.environ.items() if k not in launchers}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", _SCRIPT, str(small_dir), str(stage)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "kept" in run.stdout, run.stderr[-3000:]


class Rows:
    """Row i is one token, i."""

    pad_id, lens = 0, np.ones(9, dtype=np.int64)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([row]), np.array([row])

    def source(self, row: int) -> str:
        return f"rows.jsonl:{row}"


@pytest.mark.parametrize(("nan_at", "blamed"), [({4}, [4]), (set(), [3, 4, 5])])
def test_the_rows_that_are_bad_by_themselves_are_to_blame_or_else_all(
    nan_at: set[int], blamed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank has five rows: this one makes five forward passes, too, two of them empty."""
    monkeypatch.setattr(dist, "max_floats", lambda count: [5.0])
    passes: list[torch.Tensor] = []

    def loss_sum(ids_BT: torch.Tensor, *of_labels: torch.Tensor) -> torch.Tensor:
        passes.append(ids_BT)
        bad = any(int(token) in nan_at for token in ids_BT.flatten())
        return torch.tensor(float("nan") if bad else 1.0)

    engine: Any = SimpleNamespace(loss_sum=loss_sum)
    rows: Any = Rows()
    assert bad_alone([3, 4, 5], rows, engine) == blamed
    assert len(passes) == 5


def test_every_rank_raises_with_the_rows_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "gather", lambda own: [own, [], ["b:1", "b:2", "b:3", "b:4"]])
    rows: Any = Rows()
    with pytest.raises(NotFinite) as error:
        raise_not_finite(7, "loss is not finite, in", [3], rows)
    assert str(error.value) == (
        "step 7: the loss is not finite, in rows.jsonl:3, b:1, b:2, b:3 and 1 more"
    )


@pytest.mark.parametrize(("saved", "kept"), [(True, "are kept in ck"), (False, "could not be")])
def test_the_weights_of_the_last_good_step_are_kept(saved: bool, kept: str) -> None:
    saver: Any = SimpleNamespace(save=lambda engine, state: Path("ck"), wait=lambda: saved)
    state: Any = SimpleNamespace(step=6)
    nothing: Any = None
    with pytest.raises(UserError, match=f"lower optim.lr.*the weights after step 6 {kept}"):
        stop_not_finite(NotFinite("step 7: the loss is not finite"), nothing, saver, state)
