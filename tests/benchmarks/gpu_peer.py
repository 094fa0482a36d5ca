"""HF Trainer + peft on a Qwen2 of the 7B's shape, as a user writes it, for gpu.py."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.training_args import ParallelMode

from tests.benchmarks.gpu_answers import Say
from tests.benchmarks.gpu_ours import memory, speed
from tests.benchmarks.gpu_plan import ALL_TARGETS, Plan, Setting
from tests.benchmarks.gpu_profile import wait

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class _Clock(TrainerCallback):
    """The end of each step; the peak of memory is that after the first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wait(self.device)
        if not self.times and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.times.append(time.perf_counter())


def make_peer(plan: Plan, setting: Setting, device: torch.device) -> torch.nn.Module:
    """The same shape and adapter; random weights."""
    assert setting.targets == ALL_TARGETS and not setting.whole
    shape = Qwen2Config(
        vocab_size=plan.vocab, hidden_size=plan.hidden, use_cache=False,
        intermediate_size=plan.intermediate // 2, num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads, num_key_value_heads=plan.heads, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=setting.r, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS
    )
    wrapped = get_peft_model(model, adapter)
    if setting.recompute:
        wrapped.enable_input_require_grads()
    return wrapped


def measure_peer(plan: Plan, setting: Setting, device: torch.device, say: Say) -> None:
    """Time steps by the Trainer's callbacks, from the second on."""
    steps, clock = 1 + plan.timed_steps, _Clock(device)
    number = steps * plan.micro_batches * setting.rows
    ids = torch.randint(0, plan.vocab, (number, setting.length))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=device.type == "cpu", bf16=True, max_steps=steps,
            per_device_train_batch_size=setting.rows,
            gradient_accumulation_steps=plan.micro_batches,
            gradient_checkpointing=setting.recompute,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        mode = arguments.parallel_mode  # of ranks or several GPUs it would make another job
        assert mode == ParallelMode.NOT_PARALLEL, mode
        model = make_peer(plan, setting, device)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock])
        loss = trainer.train().training_loss
    seconds = (clock.times[-1] - clock.times[0]) / plan.timed_steps
    tokens = plan.micro_batches * setting.rows * setting.length
    figures = {"seconds": seconds, "loss": loss, **memory(device)}
    say(figures | speed(plan, setting, tokens, seconds, device))
