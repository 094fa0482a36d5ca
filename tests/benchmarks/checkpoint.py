"""What saving costs a training: the adapter of the 7B's shape (r 64 on all four targets) with its
moments, 1.7 GB.

    deepspeed --num_gpus 2 tests/benchmarks/checkpoint.py [--stage 2] [--rounds 3] [--folder DIR]

Prints, for each round, how long the training stands still (the gather), how long the thread then
writes and hashes, the memory that rank 0 needs for it as a multiple of the adapter's fp32 size, and
beside them a plain `cp` and `sha256sum` of the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_ds import dist
from qwen_ds.machine import choose_device
from qwen_ds.plan import deepspeed_json as ds_config
from qwen_ds.recipe.options import ModelOptions, OptimOptions, Recipe
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.engine.start import start_process_group, stop_process_group
from qwen_ds.train.lora import LoraConfig
from qwen_ds.train.survive.checkpoint_writer import RunState, Saver
from qwen_ds.train.survive.result import Output
from qwen_ds.train.survive.watchdog import Watchdog

BLOCKS, RANK = 32, 64
SHAPES = {
    "c_attn": (4096, 12288), "attn.c_proj": (4096, 4096), "w1": (4096, 11008), "w2": (4096, 11008),
    "mlp.c_proj": (11008, 4096),
}  # fmt: skip


class Adapter(nn.Module):
    """The trainable parameters alone, and a loss that touches all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ParameterDict()
        for block in range(BLOCKS):
            for name, (width, height) in SHAPES.items():
                key = f"{block}_{name}".replace(".", "_")
                self.model[f"{key}_A"] = nn.Parameter(torch.zeros(RANK, width))
                self.model[f"{key}_B"] = nn.Parameter(torch.zeros(height, RANK))
        self.loss_head: Any = None

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sum((p.mean() for p in self.model.values()), torch.zeros(()))


def memory(field: str) -> int:
    line = next(
        text
        for text in Path("/proc/self/status").read_text().splitlines()
        if text.startswith(field)
    )
    return int(line.split()[1]) * 1024


def measure(saver: Saver, trained: TrainingEngine, step: int, size: int) -> str:
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    saver.save(trained, RunState(step, 10, {}, {}))
    stall = time.perf_counter() - start
    assert saver.wait()
    return (
        f"training stands still {stall:.2f} s; "
        f"written and hashed after {time.perf_counter() - start:.2f} s; "
        f"{(memory('VmHWM') - before) / size:.2f} x the adapter's fp32 size"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    start_process_group(choose_device("cpu"), 10)
    recipe = Recipe(model=ModelOptions(dtype="float32"))
    config = {"zero_optimization": {"stage": options.stage}}
    resolved = ds_config.resolve(
        config, recipe, frozenset(), hidden_size=64, world=dist.world_size()
    )
    model: Any = Adapter()
    size = 4 * sum(p.numel() for p in model.parameters())
    trained = TrainingEngine(model, OptimOptions(), resolved)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    trained.backward(trained.loss_sum(ids, ids), last_of_step=True)
    trained.step()
    folder = Path(tempfile.mkdtemp(dir=options.folder)) if dist.rank() == 0 else Path("unused")
    output = Output(folder, folder, torch.float32, LoraConfig(r=RANK, target_modules=["c_attn"]))
    saver = Saver(output, {}, 1, Watchdog(10, launched=False), None)
    if dist.rank() == 0:
        print(
            f"{size / 1e6:.0f} MB of parameters, {3 * size / 1e9:.2f} GB with moments", flush=True
        )
    for step in range(1, options.rounds + 1):
        text = measure(saver, trained, step, size)
        if dist.rank() == 0:
            print(text, flush=True)
        dist.barrier()
    if dist.rank() == 0:
        source = folder / "checkpoints" / f"step_{options.rounds:06d}"
        start = time.perf_counter()
        subprocess.run(
            f"cp -r {source} {folder}/copy && sync && sha256sum {folder}/copy/* >/dev/null 2>&1",
            shell=True,
        )
        print(
            f"cp, sync and sha256sum of the same bytes: {time.perf_counter() - start:.2f} s",
            flush=True,
        )
        shutil.rmtree(folder)
    dist.barrier()
    stop_process_group()


if __name__ == "__main__":
    main()
