"""The decoding engine with Qwen-7B's shape on one GPU, in five minutes.

    python tests/benchmarks/gpu_serve.py            # prints a table, writes gpu_serve.jsonl
    python tests/benchmarks/gpu_serve.py --json results.jsonl --minutes 4
    python tests/benchmarks/gpu_serve.py --first    # fewer steps and prompts, in two minutes

It needs nothing but the repository and its wheels: weights are random, in bf16, and made on the
device. Each measurement is a process of its own, so one that fails costs no other, and its figures
are written as soon as they are there; what the processes print is in gpu_serve.log. In this order:

    batch      new tokens a second of 32 rows that have about 512 tokens each
    prefill    tokens a second of 8 prompts of 2,048 tokens
    single     new tokens a second of one row of about 512 tokens
    sampled    as batch, with tokens drawn by temperature and top_p from the whole vocabulary

Each says how attention reads pages (by block tables, one by one, or gathered first), which kernels
do it, how long the device computes in a step (the rest of the step it waits for Python), and how
often Python waits for the device in one. Results of an earlier call in the same file are kept, and
what it measured is not measured again unless --again is given. --first has a file of its own,
gpu_serve_first.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import types
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    # As in gpu.py: beside this script serve.py hides a package of ours, and a package called tests
    # that a library has installed would hide this one.
    sys.path[0] = str(ROOT)
    sys.modules["tests"] = package = types.ModuleType("tests")
    package.__path__ = [str(ROOT / "tests")]

from tests.benchmarks.gpu_plan import ServingPlan  # noqa: E402
from tests.benchmarks.gpu_processes import take_answers  # noqa: E402
from tests.benchmarks.gpu_results import Results  # noqa: E402
from tests.benchmarks.gpu_runs import Run, run_measurements  # noqa: E402

MEASUREMENTS = ("batch", "prefill", "single", "sampled")
BARS = {"batch": 4500, "single": 200}  # tokens a second on an H200


def measure_all(run: Run, plan: ServingPlan, device: str) -> None:
    """Take the figures of all measurements, in the time that is left."""
    question = {"plan": asdict(plan), "device": device}
    for name in MEASUREMENTS:
        is_last = name == MEASUREMENTS[-1]
        run.measure(name, question | {"measurement": name}, least=0, most=math.inf, is_last=is_last)


def report(results: Results) -> str:
    """The figures as Markdown."""
    lines = [
        f"{results.device or 'no device'}\n",
        "| | tokens/s | bar | ms a step | of these the device computes | waits | GB | pages |"
        " attention |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in results.found.items():
        if "remark" in figures:
            lines.append(f"| {name} | {figures['remark']} | | | | | | | |")
            continue
        cells = (
            name, f"{figures['tokens_per_second']:,.0f}", BARS.get(name, ""),
            f"{figures['step_ms']:.1f}", f"{figures['device_ms']:.1f}", figures.get("waits", ""),
            f"{figures['peak_gb']:.1f}", figures["reading"], ", ".join(figures["attention"]),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(
    arguments: Sequence[str] | None = None,
    command: Sequence[str] = (sys.executable, __file__, "--worker"),
) -> int:
    """Measure and print a table; the exit code. `command` starts a process that measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file of the results")
    parser.add_argument(
        "--minutes", type=float, default=4.5, help="end what runs after so many minutes"
    )
    parser.add_argument("--first", action="store_true", help="fewer steps and prompts")
    parser.add_argument("--again", action="store_true", help="what is in the file, too")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--plan", type=json.loads, default={}, help="other sizes, as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        answers = take_answers()  # before libraries are imported, which may print
        from tests.benchmarks.gpu_answers import answer_one
        from tests.benchmarks.gpu_serving import answer

        answer_one(answer, answers)
    plan = ServingPlan(**options.plan)
    if options.first:
        plan = replace(plan, steps=16, prompts=2)
    file = options.json or Path("gpu_serve_first.jsonl" if options.first else "gpu_serve.jsonl")

    def work(run: Run) -> None:
        if options.again:
            run.results.done.clear()
        measure_all(run, plan, options.device)

    return run_measurements(file, asdict(plan), command, options.minutes, work, report)


if __name__ == "__main__":
    sys.exit(main())
