"""Our training on one GPU, as qwen_ds starts it, for gpu.py: engine, steps and their figures.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen_ds.data.batches import Batch, Part, make_batch
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
from qwen_ds.train.engine.start import start_process_group
from qwen_ds.train.loss import TrainingModel, compiled_loss
from qwen_ds.train.observe.metrics import peak_memory_gb
from tests.benchmarks.gpu_answers import Say
from tests.benchmarks.gpu_plan import Plan, Setting
from tests.benchmarks.gpu_profile import wait


def recipe(setting: Setting) -> config.Recipe:
    adapter = config.LoraOptions(
        r=setting.r,
        targets=list(setting.targets),
        special_rows="off",
        modules_to_save=["wte", "lm_head"] if setting.whole else [],
    )
    options = config.ModelOptions(
        dtype="bfloat16",
        activation_checkpointing="all" if setting.recompute else "none",
        compile=setting.compiled,
    )
    return config.Recipe(model=options, lora=adapter)


def make_model(plan: Plan, wanted: config.Recipe, device: torch.device) -> TrainingModel:
    """Our model and adapter as training makes them, with random weights."""
    attention = "sdpa" if device.type == "cuda" else "eager"
    with torch.device(device):
        model = QWenLMHeadModel._from_config(
            plan.config(), dtype=torch.bfloat16, attn_implementation=attention
        )
    setup.recompute_blocks(model, from_recipe(wanted.model.activation_checkpointing))
    if wanted.model.compile:
        setup.compile_blocks(model, QWEN, device)
    wrapped = lora.add_lora(model, wanted.lora, base="", seed=0)
    training = TrainingModel(wrapped, model.transformer, model.lm_head)
    if wanted.model.compile:
        training.loss_head.loss_of = compiled_loss()
    return training


def make_engine(plan: Plan, setting: Setting, device: torch.device) -> TrainingEngine:
    """The engine around a model of its own. It lives until the process ends."""
    start_process_group(device, 10)
    wanted = recipe(setting)
    resolved = resolve(
        read_deepspeed_json(None), wanted, frozenset(), hidden_size=plan.hidden, world=1
    )
    made = TrainingEngine(make_model(plan, wanted, device), wanted.optim, resolved)
    made.train(True)
    return made


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Rows of random tokens, all of them targets and of one length, for the batch maker."""

    ids_NT: np.ndarray
    pad_id: int = 0

    @property
    def lens(self) -> np.ndarray:
        return np.full(*self.ids_NT.shape, dtype=np.int32)

    @property
    def learnt(self) -> np.ndarray:
        return self.lens - 1

    @property
    def parts(self) -> Sequence[Part]:
        return [Part(len(self), 1.0)]

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids_NT[row], self.ids_NT[row]


def make_batches(plan: Plan, setting: Setting, device: torch.device, number: int) -> list[Batch]:
    """Micro-batches of full rows, as training makes them; in page-locked memory for a GPU."""
    shape = (number * setting.rows, setting.length)
    rows = RandomRows(np.random.default_rng(0).integers(plan.vocab, size=shape, dtype=np.int32))
    made = [make_batch(rows, part) for part in np.split(np.arange(len(rows)), number)]
    if device.type == "cuda":
        made = [batch.pinned() for batch in made]
    return made


def loss_sum(engine: TrainingEngine, batch: Batch) -> Tensor:
    return engine.loss_sum(batch.ids_BT, batch.labels_BT, batch.places_P)


def one_step(engine: TrainingEngine, batches: list[Batch]) -> list[Tensor]:
    """An optimizer step, as the loop takes it; its loss sums, on the device."""
    targets, sums = sum(batch.num_targets for batch in batches), []
    for i, batch in enumerate(batches):
        loss = loss_sum(engine, batch)
        engine.backward(loss / targets, last_of_step=i + 1 == len(batches))
        sums.append(loss.detach())
    totals = engine.totals(sums)
    assert not totals.bad and not engine.step(totals.grad_norm).not_finite
    return sums


def measure_ours(plan: Plan, setting: Setting, device: torch.device, say: Say) -> None:
    """Time optimizer steps after one that warms up."""
    engine = make_engine(plan, setting, device)
    batches = make_batches(plan, setting, device, plan.micro_batches)
    losses: list[Tensor] = []

    def step() -> None:
        losses[:] = one_step(engine, batches)

    figures = timed(plan.timed_steps, step, device)
    tokens = sum(batch.ids_BT.numel() for batch in batches)
    figures["loss"] = float(torch.stack(losses).sum()) / sum(b.num_targets for b in batches)
    say(figures | speed(plan, setting, tokens, figures["seconds"], device))


def timed(steps: int, step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds of a step, and the peak of memory, in 10^9 bytes, after the first."""
    began = time.perf_counter()
    step()
    wait(device)
    first_seconds = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    seconds = (time.perf_counter() - began) / steps
    return {"seconds": seconds, "first_seconds": first_seconds, **memory(device)}


def memory(device: torch.device) -> dict[str, float]:
    found = {"gb": peak_memory_gb()}
    if device.type == "cuda":
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        found["alloc_retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    return found


def speed(
    plan: Plan, setting: Setting, tokens: int, seconds: float, device: torch.device
) -> dict[str, float | None]:
    """Tokens a second, and the share of the GPU's peak where that is known; see plan/flops.py.

    The gradient of a matrix that is trained whole is not in its formula: no share then.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    gpu, mfu = recognise(name), None
    if gpu and not setting.whole:
        shape = Shape.of(plan.config())
        flops = step_flops(
            shape, method="lora", tokens=tokens, targets=tokens,
            squared_tokens=tokens * setting.length,
        )  # fmt: skip
        mfu = utilisation(flops, seconds, 1, gpu)
    return {"tokens_per_second": tokens / seconds, "mfu": mfu}
