"""Qwen-7B's shape on one GPU, beside the official figures and HF Trainer, in ten minutes.

    python tests/benchmarks/gpu.py                        # prints a table, writes gpu.json
    python tests/benchmarks/gpu.py --json results.json --minutes 9

It needs nothing but the repository and its wheels: weights are random and made on the device. It
measures, in this order:

    official   batch 1, accumulation 8, LoRA r 64 on c_attn, c_proj, w1, w2, activation
               checkpointing in all blocks, 256 to 8192 tokens; the same with embedding and head
               trained whole. GB and seconds a step stand beside those in the README of QwenLM/Qwen
               (one A100-SXM4-80G).
    best       2048 tokens, nothing recomputed, 1 to 8 rows in a micro-batch, blocks compiled or not
    peer       HF Trainer + peft on a Qwen2 of the same shape, 2048 tokens, with and without
               activation checkpointing

A measurement that does not fit the memory or the time is reported as such. Rows are full: there is
no padding.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from qwen_ds.machine import choose_device
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.family import QWEN
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.plan.deepspeed_json import resolve
from qwen_ds.plan.flops import step_flops, utilisation
from qwen_ds.plan.gpus import recognise
from qwen_ds.plan.recomputation import from_recipe
from qwen_ds.plan.shape import Shape
from qwen_ds.recipe import options as config
from qwen_ds.recipe.deepspeed_json import read_deepspeed_json
from qwen_ds.train import lora, setup
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.engine.start import start_process_group, stop_process_group
from qwen_ds.train.loss import TrainingModel
from qwen_ds.train.observe.metrics import peak_memory_gb

TARGETS = ["c_attn", "c_proj", "w1", "w2"]
# Length: (GB, seconds a step), README of QwenLM/Qwen.
OFFICIAL = {
    "LoRA": {
        256: (20.1, 1.2), 512: (20.4, 1.5), 1024: (21.5, 2.8),
        2048: (23.8, 5.2), 4096: (29.7, 10.1), 8192: (36.6, 21.3),
    },
    "LoRA + embedding and head": {
        256: (33.7, 1.4), 512: (34.1, 1.6), 1024: (35.2, 2.9),
        2048: (35.1, 5.3), 4096: (39.2, 10.3), 8192: (48.5, 21.7),
    },
}  # fmt: skip
OUT_OF_MEMORY, OUT_OF_TIME = "does not fit the memory", "no time left"


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of a measurement; a test makes them tiny."""

    config: QWenConfig
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    best_length: int = 2048
    best_rows: tuple[int, ...] = (1, 2, 4, 8)
    micro_batches: int = 8
    r: int = 64
    compiled: bool = True
    timed_steps: int = 2


def recipe(
    plan: Plan, *, whole: bool = False, every: str = "all", compiled: bool = False
) -> config.Recipe:
    saved = ["wte", "lm_head"] if whole else []
    adapter = config.LoraOptions(
        r=plan.r, targets=TARGETS, special_rows="off", modules_to_save=saved
    )
    options = config.ModelOptions(
        dtype="bfloat16", activation_checkpointing=every, compile=compiled
    )  # type: ignore[arg-type]
    return config.Recipe(model=options, lora=adapter)


@contextlib.contextmanager
def our_engine(plan: Plan, wanted: config.Recipe, device: torch.device) -> Iterator[TrainingEngine]:
    """Our model, adapter and engine as training makes them, with random weights."""
    attention = "sdpa" if device.type == "cuda" else "eager"
    with torch.device(device):
        model = QWenLMHeadModel._from_config(
            plan.config, dtype=torch.bfloat16, attn_implementation=attention
        )
    setup.recompute_blocks(model, from_recipe(wanted.model.activation_checkpointing))
    if wanted.model.compile:
        setup.compile_blocks(model, QWEN, device)
    wrapped = lora.add_lora(model, wanted.lora, base="", seed=0)
    size, zero2 = plan.config.hidden_size, read_deepspeed_json(None)
    resolved = resolve(zero2, wanted, frozenset(), hidden_size=size, world=1)
    made = TrainingEngine(
        TrainingModel(wrapped, model.transformer, model.lm_head), wanted.optim, resolved
    )
    made.train(True)
    try:
        yield made
    finally:
        made._ds.destroy()


def our_steps(plan: Plan, trained: TrainingEngine, rows: int, length: int) -> dict[str, float]:
    """Time optimizer steps of `micro_batches` micro-batches of full rows, after a warm-up step."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0, plan.config.vocab_size, (plan.micro_batches, rows, length), generator=draw
    )

    def step() -> None:
        for i, ids_BT in enumerate(ids):
            loss_sum = trained.loss_sum(ids_BT, ids_BT)
            trained.backward(loss_sum / ids.numel(), last_of_step=i + 1 == len(ids))
        assert not trained.step().not_finite

    return timed(plan, step, trained.device) | {"tokens": float(ids.numel())}


def timed(plan: Plan, step: Callable[[], object], device: torch.device) -> dict[str, float]:
    on_gpu = device.type == "cuda"
    step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(plan.timed_steps):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return {"seconds": (time.perf_counter() - began) / plan.timed_steps, "gb": peak_memory_gb()}


def peer_steps(plan: Plan, device: torch.device, *, recompute: bool) -> dict[str, float]:
    """Time HF Trainer + peft as a user writes it, by its callbacks, from the second step on."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    own = plan.config
    shape = Qwen2Config(
        vocab_size=own.vocab_size, hidden_size=own.hidden_size, use_cache=False,
        intermediate_size=own.intermediate_size // 2, num_hidden_layers=own.num_hidden_layers,
        num_attention_heads=own.num_attention_heads, num_key_value_heads=own.num_attention_heads,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=plan.r, lora_alpha=16, lora_dropout=0.05, target_modules=targets
    )
    model = get_peft_model(model, adapter)
    if recompute:
        model.enable_input_require_grads()
    steps = 1 + plan.timed_steps
    ids = torch.randint(0, own.vocab_size, (steps * plan.micro_batches, plan.best_length))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
                if not times:
                    torch.cuda.reset_peak_memory_stats()
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir="unused", use_cpu=device.type == "cpu", bf16=True, max_steps=steps,
        per_device_train_batch_size=1, gradient_accumulation_steps=plan.micro_batches,
        gradient_checkpointing=recompute, gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    seconds = (times[-1] - times[0]) / plan.timed_steps
    return {
        "seconds": seconds,
        "gb": peak_memory_gb(),
        "tokens": float(plan.micro_batches * plan.best_length),
    }


class Results:
    """The figures so far; a measurement that ran out of memory or time is recorded as well."""

    def __init__(self, minutes: float) -> None:
        self.found: dict[str, dict[str, float | str]] = {}
        self._ends = time.monotonic() + 60 * minutes

    def add(self, name: str, measure: Callable[[], dict[str, float]]) -> None:
        if time.monotonic() > self._ends:
            self.found[name] = {"remark": OUT_OF_TIME}
        else:
            try:
                figures = measure()
                self.found[name] = {
                    **figures,
                    "tokens_per_second": figures["tokens"] / figures["seconds"],
                }
            except torch.OutOfMemoryError:
                self.found[name] = {"remark": OUT_OF_MEMORY}
            except Exception as error:  # it must not cost the other figures
                self.found[name] = {"remark": f"{type(error).__name__}: {error}".splitlines()[0]}
                traceback.print_exc()
        print(name, self.found[name], flush=True)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def measure(plan: Plan, device: torch.device, results: Results) -> None:
    """Add the figures of all parts to `results`."""
    for name in OFFICIAL:
        with our_engine(plan, recipe(plan, whole=name != "LoRA"), device) as trained:
            for length in plan.lengths:
                run = functools.partial(our_steps, plan, trained, 1, length)
                results.add(f"{name}, {length}", run)
    for compiled in (False, True)[: 1 + plan.compiled]:
        with our_engine(plan, recipe(plan, every="none", compiled=compiled), device) as trained:
            for rows in plan.best_rows:
                name = f"best, {rows} x {plan.best_length}{', compiled' if compiled else ''}"
                run = functools.partial(our_steps, plan, trained, rows, plan.best_length)
                results.add(name, run)
    for recompute in (True, False):
        name = f"peer, recomputation {'of all' if recompute else 'of none'}"
        results.add(name, functools.partial(peer_steps, plan, device, recompute=recompute))


def report(found: dict[str, dict[str, float | str]], plan: Plan, device_name: str) -> str:
    """The figures as Markdown."""
    lines = [
        "| | GB | official | s/step | official | tokens/s | MFU |",
        "|---|---|---|---|---|---|---|",
    ]
    shape, gpu = Shape.of(plan.config), recognise(device_name)
    for name, figures in found.items():
        if "remark" in figures:
            lines.append(f"| {name} | {figures['remark']} | | | | | |")
            continue
        gb, seconds, tokens, speed = (
            float(figures[k]) for k in ("gb", "seconds", "tokens", "tokens_per_second")
        )
        setting, _, length = name.rpartition(", ")
        official = OFFICIAL.get(setting, {}).get(int(length)) if length.isdigit() else None
        row_length = int(length) if length.isdigit() else plan.best_length
        flops = step_flops(
            shape, method="lora", tokens=tokens, targets=tokens, squared_tokens=tokens * row_length
        )
        mfu = (
            f"{utilisation(flops, seconds, 1, gpu):.1%}" if gpu and "embedding" not in name else ""
        )
        theirs = official or ("", "")
        cells = f"{gb:.1f} | {theirs[0]} | {seconds:.2f} | {theirs[1]} | {speed:,.0f} | {mfu}"
        lines.append(f"| {name} | {cells} |")
    measured = {
        name: float(figures["tokens_per_second"])
        for name, figures in found.items()
        if "remark" not in figures
    }
    ours, peers = (
        max((speed for name, speed in measured.items() if name.startswith(kind)), default=0)
        for kind in ("best", "peer")
    )
    if ours and peers:
        lines.append(f"\nThe best setting is {ours / peers:.2f} times as fast as the faster peer.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="start nothing new after so many minutes"
    )
    options = parser.parse_args()
    device = choose_device("cuda")
    start_process_group(device, 10)
    plan, name, results = (
        Plan(QWenConfig()),
        torch.cuda.get_device_name(device),
        Results(options.minutes),
    )
    try:
        measure(plan, device, results)
        stop_process_group()
    finally:  # an error must not cost the figures before it
        about = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
        sizes = {k: v for k, v in dataclasses.asdict(plan).items() if k != "config"}
        options.json.write_text(
            json.dumps({"about": about, "plan": sizes, "found": results.found}, indent=1)
        )
        print(f"\n{name}, torch {torch.__version__}\n\n{report(results.found, plan, name)}")


if __name__ == "__main__":
    main()
