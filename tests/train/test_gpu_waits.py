"""A step makes the CPU wait for a GPU once, and a micro-batch never."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from qwen_ds.data.ahead import Window
from qwen_ds.data.batches import make_batch
from qwen_ds.dist import free_port
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.plan import deepspeed_json
from qwen_ds.recipe.options import LoraOptions, ModelOptions, Recipe
from qwen_ds.train import lora
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.engine.loading import partitioned_loading
from qwen_ds.train.engine.start import start_process_group, stop_process_group
from qwen_ds.train.loop import train_step
from qwen_ds.train.loss import TrainingModel
from tests.jobs import fork
from tests.train.gpu_waits import Waits, as_on_cuda

RANKS = 2
all_reduce = torch.distributed.all_reduce


class Rows:
    """Rows of 9 to 14 tokens, of which the last 5 are learnt."""

    pad_id = 0
    lens = np.arange(9, 15)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.arange(int(self.lens[row])) + 3 * row
        labels = np.where(np.arange(len(ids)) < len(ids) - 5, -100, ids)
        return ids, labels


def waits_of_steps(model_dir: Path, method: str, stage: int, waits: Waits) -> dict[str, Any]:
    """Waits and all-reduces of optimizer steps of 2 and of 5 micro-batches, and what ZeRO-3 keeps
    whole."""
    recipe: Any = Recipe(method=method, model=ModelOptions(dtype="bfloat16"))  # type: ignore[arg-type]
    asked = {"zero_optimization": {"stage": stage, "overlap_comm": "auto"}}
    resolved = deepspeed_json.resolve(asked, recipe, frozenset(), hidden_size=64, world=RANKS)
    with partitioned_loading(resolved, torch.bfloat16):
        model: Any = QWenLMHeadModel.from_pretrained(model_dir, dtype=torch.bfloat16)
        trained = model
        if method == "lora":
            trained = lora.add_lora(model, LoraOptions(), base="", seed=1, row_ids=(3, 7))
    engine = TrainingEngine(
        TrainingModel(trained, model.transformer, model.lm_head), recipe.optim, resolved
    )
    engine.train(True)
    session: Any = SimpleNamespace(
        engine=engine, recipe=recipe, steps=9,
        data=SimpleNamespace(train=Rows(), sampler=SimpleNamespace(steps_per_epoch=9)),
        observer=SimpleNamespace(at=lambda *a: None, part=lambda name: waits),
    )  # fmt: skip
    request: Any = SimpleNamespace(noted=lambda: 0.0, reason=lambda noted: None)
    found: dict[str, Any] = {"averages": {}}
    # The first steps set things up: Adam's moments, ZeRO-3's order of gathers.
    for number, count in enumerate((2, 2, 2, 5), 1):
        batches = [make_batch(Rows(), np.array([i, i + 1])) for i in range(count)]  # type: ignore[arg-type]
        statistics: Any = None
        waits.counts.clear()
        window = Window(batches, 60, statistics)
        with mock.patch.object(torch.distributed, "all_reduce", wraps=all_reduce) as averaging:
            step, _ = train_step(session, number, window, request)
        assert step.grad_norm > 0
        found[str(count)] = dict(waits.counts)
        found["averages"][str(count)] = averaging.call_count
    kept = {"trained": True, "matrices": False}
    if stage == 3:
        parameters = list(engine.model.parameters())
        kept["trained"] = all(p.ds_persist for p in parameters if p.requires_grad)
        frozen = [p for p in parameters if not p.requires_grad and len(p.ds_shape) > 1]
        kept["matrices"] = any(p.ds_persist for p in frozen)
    return found | {"kept": kept}


def count(model_dir: Path, rank: int, port: int, out: Path) -> None:
    """Count on one rank; rank 0 writes a JSON object by method and stage."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, WORLD_SIZE=str(RANKS), RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    start_process_group(torch.device("cpu"), 2)
    found = {}
    for method, stage in (("lora", 0), ("lora", 1), ("lora", 2), ("full", 2), ("lora", 3)):
        waits = Waits()
        with as_on_cuda(waits):
            found[f"{method} {stage}"] = waits_of_steps(model_dir, method, stage, waits)
    if rank == 0:
        out.write_text(json.dumps(found))
    stop_process_group()


@pytest.mark.job
def test_a_step_waits_once_and_a_micro_batch_never(small_dir: Path, tmp_path: Path) -> None:
    """Forward, backward and update of two ranks, and what ZeRO-3 keeps whole.

    Some waits of DeepSpeed's have no switch: with overlapped communication one after every
    averaging, and under ZeRO-3 three in its step, which looks at the norm once more.
    """
    port, out = free_port(), tmp_path / "found.json"
    ranks = [fork(count, small_dir, rank, port, out) for rank in range(RANKS)]
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]
    found = json.loads(out.read_text())
    for case in ("lora 0", "lora 1", "lora 2"):
        assert found[case]["2"] == found[case]["5"] == {"tolist": 1}, (case, found[case])
    averages = {case: found[case]["averages"] for case in ("lora 1", "lora 2", "full 2")}
    assert averages["lora 2"]["2"] == averages["lora 2"]["5"] > 0, averages
    assert averages["full 2"]["5"] - averages["full 2"]["2"] >= 3, averages
    for count_ in (2, 5):
        assert found["full 2"][str(count_)] == {"tolist": 1, "accelerator.synchronize": count_}
        of_stage_3 = found["lora 3"][str(count_)]
        assert of_stage_3.pop("stream.synchronize") == 1
        assert of_stage_3.pop("tolist") == 1 and sum(of_stage_3.values()) <= 3, of_stage_3
    assert found["lora 3"]["kept"] == {"trained": True, "matrices": False}


def test_what_would_wait_is_counted() -> None:
    waits = Waits()
    numbers = torch.arange(5.0)
    with as_on_cuda(waits), waits:
        numbers[numbers > 2]
        if numbers.sum() > 3:
            numbers.nonzero()
        torch.tensor(1.0)
        numbers.tolist()
        numbers.index_select(0, torch.zeros(2, dtype=torch.int64)).sum()
    assert waits.counts == Counter(
        index=1, _local_scalar_dense=1, nonzero=1, lift_fresh=1, tolist=1
    )
