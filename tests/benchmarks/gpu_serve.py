"""The decoding engine with Qwen-7B's shape on one GPU, in five minutes.

    python tests/benchmarks/gpu_serve.py            # prints a table, writes gpu_serve.json
    python tests/benchmarks/gpu_serve.py --json results.json --minutes 4
    python tests/benchmarks/gpu_serve.py --first    # fewer steps and prompts, in two minutes

It needs nothing but the repository and its wheels: weights are random, in bf16, and made on the
device. Each measurement is a process of its own, so one that fails costs no other, and its figures
are written as soon as they are there. In this order:

    batch      new tokens a second of 32 rows that have about 512 tokens each
    prefill    tokens a second of 8 prompts of 2,048 tokens
    single     new tokens a second of one row of about 512 tokens
    sampled    as batch, with tokens drawn by temperature and top_p from the whole vocabulary

Each says how attention reads pages (by block tables, one by one, or gathered first), which kernels
do it, how long the device computes in a step (the rest of the step it waits for Python), and how
often Python waits for the device in one. Results of an earlier call in the same file are kept, and
what it measured is not measured again unless --again is given.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # beside this script serve.py hides a package of ours
    sys.path[0] = str(Path(__file__).parents[2])

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
from qwen_ds.machine import choose_device
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.packing import alpha_of_prompt, kv_shape
from qwen_ds.runlog import run_command
from qwen_ds.train.observe.metrics import peak_memory_gb
from tests.benchmarks.gpu_profile import activities, kernels, synchronisations

ROOT = Path(__file__).parents[2]
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
    engine: DecodingEngine, plan: Plan, draw: random.Random, rows: int, length: int,
    sampling: SamplingParams,
) -> list[int]:  # fmt: skip
    """Queue requests of random tokens; their ids."""
    ids = []
    for _ in range(rows):
        prompt = [draw.randrange(plan.vocab) for _ in range(length)]
        ids.append(engine.submit(Request(prompt, sampling, StopRule())))
    return ids


def decode(
    engine: DecodingEngine, plan: Plan, rows: int, *, is_sampled: bool = False
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


def prefill(engine: DecodingEngine, plan: Plan) -> dict[str, Any]:
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


MEASUREMENTS: dict[str, Callable[[DecodingEngine, Plan], dict[str, Any]]] = {
    "batch": lambda engine, plan: decode(engine, plan, plan.rows),
    "prefill": prefill,
    "single": lambda engine, plan: decode(engine, plan, 1),
    "sampled": lambda engine, plan: decode(engine, plan, plan.rows, is_sampled=True),
}


def measure(name: str, plan: Plan, device: torch.device) -> dict[str, Any]:
    """The figures of one measurement, in this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)
    engine = make_engine(plan, device)
    with torch.inference_mode():
        figures = MEASUREMENTS[name](engine, plan)
        if device.type == "cuda":  # one more step; a CPU is never waited for
            figures["waits"] = synchronisations(engine.step, device).total()
        figures |= look_into_step(engine, device)
    assert isinstance(engine.store, PagedStore)
    return figures | {
        "tokens_per_second": figures["tokens"] / figures["seconds"],
        "step_ms": 1000 * figures["seconds"] / figures["steps"],
        "peak_gb": peak_memory_gb(),
        "reading": engine.store.reading,
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


def measure_all(
    plan: Plan, device: str, minutes: float, out: Path, *, again: bool = True
) -> dict[str, dict[str, Any]]:
    """All measurements, each written to `out` as soon as it is there."""
    ends = time.monotonic() + 60 * minutes
    found: dict[str, dict[str, Any]] = {}
    if not again and out.is_file():
        earlier = json.loads(out.read_text(encoding="utf-8"))
        if earlier["plan"] == asdict(plan):
            found = {name: one for name, one in earlier["found"].items() if "remark" not in one}
    about = {"torch": torch.__version__, "python": platform.python_version()}
    for name in MEASUREMENTS:
        if name not in found:
            found[name] = measure_apart(name, plan, device, ends - time.monotonic())
        print(name, found[name], flush=True)
        text = json.dumps({"about": about, "plan": asdict(plan), "found": found}, indent=1)
        out.write_text(text, encoding="utf-8")
    return found


def report(found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| | tokens/s | bar | ms a step | of these the device computes | waits | GB | pages |"
        " attention |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in found.items():
        if "remark" in figures:
            lines.append(f"| {name} | {figures['remark']} | | | | | | | |")
            continue
        speed, bar = f"{figures['tokens_per_second']:,.0f}", f"{BARS.get(name, '')}"
        pages = figures["reading"]
        times = f"{figures['step_ms']:.1f} | {figures['device_ms']:.1f} | {figures['waits']}"
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
    parser.add_argument("--first", action="store_true", help="fewer steps and prompts")
    parser.add_argument("--again", action="store_true", help="what is in the file, too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plan", type=json.loads, default={}, help="sizes, as JSON")
    parser.add_argument("--measurement", choices=list(MEASUREMENTS), help="this one, here")
    options = parser.parse_args(arguments)
    plan = Plan(**options.plan)
    if options.first:
        plan = replace(plan, steps=16, prompts=2)
    if options.measurement:
        device = choose_device(options.device)
        print(json.dumps(measure(options.measurement, plan, device)))
        return
    found = measure_all(plan, options.device, options.minutes, options.json, again=options.again)
    device_name = next((f["device"] for f in found.values() if "device" in f), "no device")
    print(f"\n{device_name}, torch {torch.__version__}\n\n{report(found)}")


if __name__ == "__main__":
    run_command(main)
