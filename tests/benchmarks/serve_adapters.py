"""One decoding step of 32 rows with four adapters beside the same step of the bare base.

    python tests/benchmarks/serve_adapters.py [--rank 8] [--adapters 4] [--rounds 40] [--device cpu]

A base of 110M parameters, in bf16; LoRA on all linear layers of its blocks. Each round times the
same step several ways, one after another, so that they meet the same machine:

    bare      a model without adapters
    beside    a model that has them, all rows the base's
    one       all rows of one adapter
    several   each row of another adapter than the one before it
    gathered  the same by matrices gathered for each row, as CUDA graphs have it

and prints of each the median of its milliseconds, and of its ratios to bare in the same round. On a
CPU these are milliseconds of the process, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from qwen_ds.decode.engine import PackedStep, Runs, packed
from qwen_ds.decode.kv import Segment
from qwen_ds.decode.kv_rows import ContiguousStore
from qwen_ds.model.adapter import read_adapter
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.family import QWEN
from qwen_ds.model.modeling import QWenLMHeadModel
from serve.engine import adapted
from serve.engine.adapters import AdaptedModel, put_adapters

ROWS = 32


def shape_110m() -> QWenConfig:
    return QWenConfig(
        vocab_size=16_384, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        kv_channels=64, intermediate_size=4096, seq_length=2048,
    )  # fmt: skip


def step_after(model: QWenLMHeadModel, context: int, runs: Runs | Tensor) -> PackedStep:
    """A step of one token a row, each after `context` tokens (whose keys are zeros)."""
    device = next(model.parameters()).device
    store = ContiguousStore(QWEN.kv_shape(model.config, model.dtype, device), 1 << 20)
    segments = []
    for i in range(ROWS):
        row = store.open([])
        store.grow(row, context + 1)
        row.length = context
        segments.append(Segment(row, i, 1))
    store.plan(segments)
    ids_1N = torch.arange(ROWS, device=device)[None]
    positions_1N = torch.full((1, ROWS), context, device=device)
    due_R = torch.arange(ROWS, device=device)
    return PackedStep(
        ids_1N, positions_1N, 0, due_R, runs, () if isinstance(runs, Tensor) else runs, store
    )


@torch.no_grad()
def measure(
    config: QWenConfig, rank: int, adapters: int, rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of a step in each round, by the way it is made."""
    torch.manual_seed(0)
    bare, wrapped = (QWenLMHeadModel(config).eval().bfloat16() for _ in range(2))
    bare.to(torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        options = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
        model = QWenLMHeadModel(config)
        get_peft_model(model, options).save_pretrained(folder)
        found = {f"adapter {i}": read_adapter(folder) for i in range(adapters)}
        wrapped.load_state_dict(bare.state_dict(), assign=True)  # the same memory
        served = put_adapters(wrapped, found, QWEN)
    names = list(found)
    none, one = [(None, ROWS)], [(names[0], ROWS)]
    several = [(names[i % adapters], 1) for i in range(ROWS)]
    number_N = torch.tensor(served.numbers(several), device=device)

    def run(model: QWenLMHeadModel, runs: Runs | Tensor) -> Callable[[], Tensor]:
        step = step_after(bare, 64, runs)
        forward = AdaptedModel(packed(model), served)
        return lambda: forward(step)

    ways = {
        "bare": run(bare, none), "beside": run(wrapped, none), "one": run(wrapped, one),
        "several": run(wrapped, several), "gathered": run(wrapped, number_N),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    side_by_side = adapted.SIDE_BY_SIDE
    clock = time.process_time if device == "cpu" else time.perf_counter
    for _ in range(rounds):
        for way, act in ways.items():
            adapted.SIDE_BY_SIDE = 0 if way == "gathered" else side_by_side
            started = clock()
            act()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds[way].append(clock() - started)
    adapted.SIDE_BY_SIDE = side_by_side
    return seconds


def ratio(seconds: dict[str, list[float]], way: str) -> float:
    """Median ratio of a way's seconds to those of the bare base in the same round."""
    return median(a / b for a, b in zip(seconds[way], seconds["bare"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    found = measure(shape_110m(), given.rank, given.adapters, given.rounds, given.device)
    for way, seconds in found.items():
        print(f"{way:10s} {median(seconds) * 1e3:8.2f} ms  {ratio(found, way):6.3f} x bare")


if __name__ == "__main__":
    main()
