"""The decoding engine on one GPU, for gpu_serve.py: what a process measures."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch
from torch.profiler import profile

from qwen_ds.decode.engine import DecodingEngine, packed
from qwen_ds.decode.graphs import GraphedModel
from qwen_ds.decode.kv import pages_in
from qwen_ds.decode.kv_pages import PagedStore
from qwen_ds.decode.paged_attention import page_tokens
from qwen_ds.decode.request import Request, Vocabulary
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.scheduler import EngineLimits
from qwen_ds.decode.stop import StopRule
from qwen_ds.model.attention_kernels import without_cudnn_attention
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.packing import alpha_of_prompt, kv_shape
from qwen_ds.train.observe.metrics import peak_memory_gb
from tests.benchmarks.gpu_answers import Question, Say, measured
from tests.benchmarks.gpu_plan import ServingPlan
from tests.benchmarks.gpu_profile import activities, kernels, synchronisations

ATTENTION = ("attention", "attn", "flash", "fmha")  # in the names of kernels and operators


def make_engine(plan: ServingPlan, device: torch.device) -> DecodingEngine:
    config = plan.config()
    with torch.device(device):
        model = QWenLMHeadModel._from_config(config, dtype=torch.bfloat16).eval()
    shape = kv_shape(config, model.dtype, device)
    page = page_tokens(shape)
    store = PagedStore(shape, pages_in(plan.memory_gb * 1e9, shape, page), page)
    forward = packed(model)
    if device.type == "cuda":
        forward = GraphedModel(forward, store, plan.rows)
    limits = EngineLimits(plan.rows, plan.prefill_tokens, 8192)
    alpha_of = functools.partial(alpha_of_prompt, config)
    no_text = Vocabulary(plan.vocab, lambda _: "", lambda _: b"")
    return DecodingEngine(forward, store, no_text, limits, alpha_of)


def submit(
    engine: DecodingEngine, plan: ServingPlan, draw: random.Random, rows: int, length: int,
    sampling: SamplingParams,
) -> list[int]:  # fmt: skip
    """Queue requests of random tokens; their ids."""
    ids = []
    for _ in range(rows):
        prompt = [draw.randrange(plan.vocab) for _ in range(length)]
        ids.append(engine.submit(Request(prompt, sampling, StopRule())))
    return ids


def decode(
    engine: DecodingEngine, plan: ServingPlan, rows: int, *, is_sampled: bool = False
) -> dict[str, Any]:
    """Time steps in which every row decodes, in the middle of which they have `context` tokens."""
    warm_up, draw, ids = 4, random.Random(0), list[int]()
    length = max(1, plan.context - plan.steps // 2 - warm_up)
    sampling = SamplingParams(is_sampled, 1.0, 0.9, 0, max_new_tokens=4 * plan.steps)
    for _ in range(2):  # graphs of all lengths are captured the first time
        for number in ids:
            engine.cancel(number)
        ids = submit(engine, plan, draw, rows, length, sampling)
        while len(engine.step()) < rows:
            pass
        for _ in range(warm_up):
            engine.step()
        began = time.perf_counter()
        for _ in range(plan.steps):
            updates = engine.step()
            assert len(updates) == rows
        seconds = time.perf_counter() - began
    return {"tokens": rows * plan.steps, "seconds": seconds, "steps": plan.steps}


def prefill(engine: DecodingEngine, plan: ServingPlan) -> dict[str, Any]:
    """Time prompts, after one that warms up."""
    draw, length = random.Random(0), plan.prompt_tokens
    sampling = SamplingParams(max_new_tokens=1)
    for rows in (1, plan.prompts):
        submit(engine, plan, draw, rows, length, sampling)
        began, before = time.perf_counter(), engine.figures.steps
        while engine.is_busy:
            engine.step()
        seconds, steps = time.perf_counter() - began, engine.figures.steps - before
    assert engine.figures.cached_tokens == 0
    submit(engine, plan, draw, 4, length, sampling)  # for the steps that are looked into
    return {"tokens": plan.prompts * length, "seconds": seconds, "steps": steps}


def look_into_step(engine: DecodingEngine, device: torch.device) -> dict[str, Any]:
    """The device's milliseconds in one more step, and its kernels of attention, the longest first.

    On a CPU: its operators.
    """
    with profile(activities=activities(device)) as found:
        engine.step()
    seen = kernels(found, device)
    names = [name for name, _ in seen if any(word in name.lower() for word in ATTENTION)]
    return {"device_ms": sum(ms for _, ms in seen), "attention": names[:3]}


MEASUREMENTS: dict[str, Callable[[DecodingEngine, ServingPlan], dict[str, Any]]] = {
    "batch": lambda engine, plan: decode(engine, plan, plan.rows),
    "prefill": prefill,
    "single": lambda engine, plan: decode(engine, plan, 1),
    "sampled": lambda engine, plan: decode(engine, plan, plan.rows, is_sampled=True),
}


def answer(question: Question, out: TextIO) -> bool:
    """Write the figures of one measurement; see `measured`."""
    return measured(_measure, question, out)


def _measure(question: Question, device: torch.device, say: Say) -> None:
    name, plan = question["measurement"], ServingPlan(**question["plan"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        without_cudnn_attention()
    engine = make_engine(plan, device)
    with torch.inference_mode():
        figures = MEASUREMENTS[name](engine, plan)
        if device.type == "cuda":  # one more step; a CPU is never waited for
            figures["waits"] = synchronisations(engine.step, device).total()
        figures |= look_into_step(engine, device)
    assert isinstance(engine.store, PagedStore)
    figures |= {
        "tokens_per_second": figures["tokens"] / figures["seconds"],
        "step_ms": 1000 * figures["seconds"] / figures["steps"],
        "peak_gb": peak_memory_gb(),
        "reading": engine.store.reading,
    }
    say(figures)
