"""The decoding engine with Qwen-7B's shape on one GPU, in five minutes.

    python tests/benchmarks/gpu_serve.py            # prints a table, writes gpu_serve.json
    python tests/benchmarks/gpu_serve.py --json results.json --minutes 4

It needs nothing but the repository and its wheels: weights are random, in bf16, and made on the
device. Each measurement is a process of its own, so one that fails costs no other, and its figures
are written as soon as they are there. In this order:

    batch      new tokens a second of 32 rows that have about 512 tokens each
    prefill    tokens a second of 8 prompts of 2,048 tokens
    single     new tokens a second of one row of about 512 tokens

Each says whether attention reads pages by block tables or gathers them first, which kernels do it,
and how long the device computes in a step: the rest of the step it waits for Python.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # beside this script serve.py hides a package of ours
    sys.path[0] = str(Path(__file__).parents[2])

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from qwen_ds.decode.engine import DecodingEngine, packed
from qwen_ds.decode.graphs import GraphedModel
from qwen_ds.decode.kv import pages_in
from qwen_ds.decode.kv_pages import PagedStore
from qwen_ds.decode.request import Request, Vocabulary
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.scheduler import EngineLimits
from qwen_ds.decode.stop import StopRule
from qwen_ds.machine import choose_device
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.packing import alpha_of_prompt, kv_shape
from qwen_ds.runlog import run_command
from qwen_ds.train.observe.metrics import peak_memory_gb

ROOT = Path(__file__).parents[2]
PAGE_TOKENS = 32  # those of serve.engine, which serve.py beside this script hides
OUT_OF_TIME = "no time left"
BARS = {"batch": 4500, "single": 200}  # tokens a second on an H200
ATTENTION = ("attention", "attn", "flash", "fmha")  # in the names of kernels and operators


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of a measurement; a test makes them tiny."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    intermediate: int = 22016
    vocab: int = 151936
    rows: int = 32
    context: int = 512
    steps: int = 64  # timed
    prompts: int = 8
    prompt_tokens: int = 2048
    prefill_tokens: int = 4096
    memory_gb: float = 20.0  # of keys and values: 38,000 tokens of the 7B

    def config(self) -> QWenConfig:
        return QWenConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, kv_channels=self.hidden // self.heads,
            intermediate_size=self.intermediate,
        )  # fmt: skip


def make_engine(plan: Plan, device: torch.device) -> DecodingEngine:
    config = plan.config()
    with torch.device(device):
        model = QWenLMHeadModel._from_config(config, dtype=torch.bfloat16).eval()
    shape = kv_shape(config, model.dtype, device)
    pages = pages_in(plan.memory_gb * 1e9, shape, PAGE_TOKENS)
    store = PagedStore(shape, pages, PAGE_TOKENS)
    forward = packed(model)
    if device.type == "cuda":
        forward = GraphedModel(forward, store, plan.rows)
    limits = EngineLimits(plan.rows, plan.prefill_tokens, 8192)
    alpha_of = functools.partial(alpha_of_prompt, config)
    no_text = Vocabulary(plan.vocab, lambda _: "", lambda _: b"")
    return DecodingEngine(forward, store, no_text, limits, alpha_of)


def submit(
    engine: DecodingEngine, plan: Plan, draw: random.Random, rows: int, length: int, new: int
) -> list[int]:
    """Queue greedy requests of random tokens; their ids."""
    sampling, ids = SamplingParams(max_new_tokens=new), []
    for _ in range(rows):
        prompt = [draw.randrange(plan.vocab) for _ in range(length)]
        ids.append(engine.submit(Request(prompt, sampling, StopRule())))
    return ids


def decode(engine: DecodingEngine, plan: Plan, rows: int) -> dict[str, Any]:
    """Time steps in which every row decodes, in the middle of which they have `context` tokens."""
    warm_up, draw, ids = 4, random.Random(0), list[int]()
    length = max(1, plan.context - plan.steps // 2 - warm_up)
    for _ in range(2):  # graphs of all lengths are captured the first time
        for number in ids:
            engine.cancel(number)
        ids = submit(engine, plan, draw, rows, length, 4 * plan.steps)
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


def prefill(engine: DecodingEngine, plan: Plan) -> dict[str, Any]:
    """Time prompts, after one that warms up."""
    draw, length = random.Random(0), plan.prompt_tokens
    for rows in (1, plan.prompts):
        submit(engine, plan, draw, rows, length, 1)
        began, before = time.perf_counter(), engine.figures.steps
        while engine.is_busy:
            engine.step()
        seconds, steps = time.perf_counter() - began, engine.figures.steps - before
    assert engine.figures.cached_tokens == 0
    submit(engine, plan, draw, 1, length, 1)  # for the step that is looked into
    return {"tokens": plan.prompts * length, "seconds": seconds, "steps": steps}


def look_into_step(engine: DecodingEngine, device: torch.device) -> dict[str, Any]:
    """The device's milliseconds in one more step, and its kernels of attention, the longest first.

    On a CPU: its operators.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        engine.step()
    on_gpu = device.type == "cuda"
    # An operator's device time is that of its kernels, which have events of their own.
    counted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    seen = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.key)
        for event in found.key_averages()
        if event.device_type == counted and not event.is_user_annotation
    ]
    seen.sort(reverse=True)
    kernels = [name for _, name in seen if any(word in name.lower() for word in ATTENTION)]
    return {"device_ms": sum(us for us, _ in seen) / 1000, "attention": kernels[:3]}


MEASUREMENTS: dict[str, Callable[[DecodingEngine, Plan], dict[str, Any]]] = {
    "batch": lambda engine, plan: decode(engine, plan, plan.rows),
    "prefill": prefill,
    "single": lambda engine, plan: decode(engine, plan, 1),
}


def measure(name: str, plan: Plan, device: torch.device) -> dict[str, Any]:
    """The figures of one measurement, in this process."""
    engine = make_engine(plan, device)
    with torch.inference_mode():
        figures = MEASUREMENTS[name](engine, plan)
        figures |= look_into_step(engine, device)
    assert isinstance(engine.store, PagedStore)
    return figures | {
        "tokens_per_second": figures["tokens"] / figures["seconds"],
        "step_ms": 1000 * figures["seconds"] / figures["steps"],
        "peak_gb": peak_memory_gb(),
        "reads_tables": engine.store._reads_tables,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def measure_apart(name: str, plan: Plan, device: str, seconds: float) -> dict[str, Any]:
    """The figures of one measurement, in a process of its own; or a remark why there are none."""
    if seconds <= 0:
        return {"remark": OUT_OF_TIME}
    arguments = ["--measurement", name, "--plan", json.dumps(asdict(plan)), "--device", device]
    try:
        done = subprocess.run(
            [sys.executable, __file__, *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"remark": OUT_OF_TIME}
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr, flush=True)
        return {"remark": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_all(plan: Plan, device: str, minutes: float, out: Path) -> dict[str, dict[str, Any]]:
    """All measurements, each written to `out` as soon as it is there."""
    ends = time.monotonic() + 60 * minutes
    found: dict[str, dict[str, Any]] = {}
    about = {"torch": torch.__version__, "python": platform.python_version()}
    for name in MEASUREMENTS:
        found[name] = measure_apart(name, plan, device, ends - time.monotonic())
        print(name, found[name], flush=True)
        out.write_text(json.dumps({"about": about, "plan": asdict(plan), "found": found}, indent=1))
    return found


def report(found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| | tokens/s | bar | ms a step | of these the device computes | GB | pages | attention |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in found.items():
        if "remark" in figures:
            lines.append(f"| {name} | {figures['remark']} | | | | | | |")
            continue
        speed, bar = f"{figures['tokens_per_second']:,.0f}", f"{BARS.get(name, '')}"
        pages = "read by tables" if figures["reads_tables"] else "gathered"
        times = f"{figures['step_ms']:.1f} | {figures['device_ms']:.1f}"
        kernels = ", ".join(figures["attention"])
        lines.append(
            f"| {name} | {speed} | {bar} | {times} | {figures['peak_gb']:.1f} | {pages} |"
            f" {kernels} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("gpu_serve.json"))
    parser.add_argument(
        "--minutes", type=float, default=4.5, help="end what runs after so many minutes"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plan", type=json.loads, default={}, help="sizes, as JSON")
    parser.add_argument("--measurement", choices=list(MEASUREMENTS), help="this one, here")
    options = parser.parse_args(arguments)
    device, plan = choose_device(options.device), Plan(**options.plan)
    if options.measurement:
        print(json.dumps(measure(options.measurement, plan, device)))
        return
    found = measure_all(plan, options.device, options.minutes, options.json)
    device_name = next((f["device"] for f in found.values() if "device" in f), "no device")
    print(f"\n{device_name}, torch {torch.__version__}\n\n{report(found)}")


if __name__ == "__main__":
    run_command(main)
