"""One block and one optimizer step looked into, for gpu.py: time, bytes, launches, waiting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import profile

from qwen_ds.data.batches import Batch
from qwen_ds.model.family import QWEN
from qwen_ds.model.liger import liger_pieces, liger_version
from qwen_ds.model.pieces import fill
from qwen_ds.train import setup
from qwen_ds.train.engine.engine import TrainingEngine
from tests.benchmarks.gpu_answers import Say
from tests.benchmarks.gpu_ours import (
    loss_sum,
    make_batches,
    make_engine,
    make_model,
    one_step,
    recipe,
)
from tests.benchmarks.gpu_plan import Plan, Setting
from tests.benchmarks.gpu_profile import activities, kernels, synchronisations, wait
from tests.moved import Moved, fused

FEW, MANY = 1, 3  # micro-batches of the steps that are compared


def check_block(plan: Plan, setting: Setting, device: torch.device, say: Say) -> None:
    """Forward and backward of one block with its adapter, gradients accumulating."""
    one = replace(plan, layers=1, vocab=min(plan.vocab, 1024))
    model = make_model(one, recipe(setting), device)
    (batch,) = make_batches(one, setting, device, 1)
    transformer = model.model.get_submodule("base_model.model.transformer")
    block, inputs = transformer.get_submodule("h.0"), []
    hook = block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments))
    with torch.no_grad():
        transformer(batch.ids_BT.to(device), use_cache=False, extend_context=False)
    hook.remove()
    x_BTD, *others = inputs[0]
    x_BTD = x_BTD.requires_grad_()
    grad_BTD = torch.randn_like(x_BTD)

    def run() -> None:
        block(x_BTD, *others).backward(grad_BTD)
        x_BTD.grad = None

    tokens = setting.rows * setting.length
    with Moved() as moved:
        run()
    figures: dict[str, Any] = of_runs(plan, run, device) | _mb(moved.bytes.total(), tokens)
    say({"line": "block, eager", **figures})
    if plan.compiled:
        if device.type == "cuda" and liger_version():
            fill(block, liger_pieces())
            say({"line": "block, liger-kernel", **of_runs(plan, run, device)})
        else:
            say({"line": "block, liger-kernel", "remark": "no GPU, or no liger-kernel here"})
        setup.compile_blocks(model.model.get_submodule("base_model.model"), QWEN, device)
        began = time.perf_counter()
        with fused() as inductor:
            run()
        wait(device)
        figures = {"compilation_s": time.perf_counter() - began}
        figures |= of_runs(plan, run, device) | _mb(inductor.bytes, tokens)
        say({"line": "block, compiled", **figures})


def _mb(moved: int, tokens: int) -> dict[str, float]:
    return {"mb_a_token": moved / 1e6 / tokens}


def of_runs(plan: Plan, run: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Milliseconds of a run where they follow each other, and until one has been launched."""
    for _ in range(2):
        run()
    wait(device)
    began = time.perf_counter()
    for _ in range(plan.repeats):
        run()
    wait(device)
    ms, launched = 1000 * (time.perf_counter() - began) / plan.repeats, []
    for _ in range(plan.repeats):
        began = time.perf_counter()
        run()
        launched.append(1000 * (time.perf_counter() - began))
        wait(device)
    return {"ms": ms, "cpu_ms": statistics.median(launched)}


def check_step(plan: Plan, setting: Setting, device: torch.device, say: Say) -> None:
    """Steps of FEW and of MANY micro-batches: their difference belongs to the micro-batches."""
    engine = make_engine(plan, setting, device)
    few, many = (make_batches(plan, setting, device, number) for number in (FEW, MANY))
    for batches in (few, many, few):  # the first steps allocate the optimizer's state
        one_step(engine, batches)
    wait(device)
    waits = [synchronisations(lambda b=each: one_step(engine, b), device) for each in (few, many)]
    places = [f"{number} x {place}" for place, number in waits[1].most_common()]
    say({
        "line": "step, synchronisations", **_shares(*(each.total() for each in waits)),
        "micro_batches": MANY, "places": places,
    })  # fmt: skip
    say({"line": "step, a micro-batch", **of_micro_batches(plan, engine, many, device)})
    one_step(engine, few)  # with it go the gradients of those micro-batches
    found = []
    for batches in ([], few, many):
        with profile(activities=activities(device)) as seen:
            if batches:
                one_step(engine, batches)
            wait(device)
        found.append(seen)
    idle, *found = found
    for line, names in (("launches", LAUNCHES), ("calls that wait", WAITS)):
        own = calls(idle.key_averages(), names)  # of the wait itself, and the profiler's
        counts = (calls(seen.key_averages(), names) - own for seen in found)
        say({"line": f"step, {line}", **_shares(*counts)})
    device_ms = [sum(ms for _, ms in kernels(seen, device)) for seen in found]
    longest = [f"{name[:60]} {ms:.2f} ms" for name, ms in kernels(found[0], device)[:12]]
    say({"line": "step, ms of the device", **_shares(*device_ms), "longest": longest})


# Calls of CUDA's runtime and driver, as the profiler names them.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def calls(events: Iterable[Any], names: tuple[str, ...]) -> int:
    return sum(event.count for event in events if event.key.startswith(names))


def _shares(few: float, many: float) -> dict[str, float]:
    """What a micro-batch adds, and what a step has beside."""
    each = (many - few) / (MANY - FEW)
    return {"a_micro_batch": each, "a_step": few - FEW * each}


def of_micro_batches(
    plan: Plan, engine: TrainingEngine, batches: list[Batch], device: torch.device
) -> dict[str, float]:
    """Milliseconds of a micro-batch's forward and backward, whole and until they are launched."""
    whole, launched = [], []
    for number in range(plan.repeats):
        batch = batches[number % len(batches)]
        wait(device)
        began = time.perf_counter()
        engine.backward(loss_sum(engine, batch) / batch.num_targets, last_of_step=False)
        launched.append(1000 * (time.perf_counter() - began))
        wait(device)
        whole.append(1000 * (time.perf_counter() - began))
    return {"ms": statistics.median(whole), "cpu_ms": statistics.median(launched)}
