"""Qwen-7B's shape on one GPU, beside the official figures and HF Trainer, in ten minutes.

    python tests/benchmarks/gpu.py --first          # the checks and the goals, under 4 minutes
    python tests/benchmarks/gpu.py                  # everything, or what the first part left
    python tests/benchmarks/gpu.py --list           # the plan; needs no GPU
    python tests/benchmarks/gpu.py --only block     # what has this word in its name

It needs the repository, torch 2.11 or newer, and what trains: transformers, peft, accelerate,
datasets, DeepSpeed, jsonargparse, tiktoken. Weights are random and made on the device; rows are
full, so there is no padding. Each measurement is a process of its own. Its figures are written to
gpu.jsonl as they come, so a run that is ended keeps what it has, and the same command goes on from
there; what the processes print is in gpu.log. What does not fit the memory or the time is a line as
well. In this order:

    attention  which SDPA kernel torch prefers and which runs; milliseconds of 50 lengths that it
               has not met, and of the same again, with cuDNN's kernel and without
    block      one block with the adapter of lora_zero2.yaml, eager, by liger-kernel if it is there
               and compiled: milliseconds, and bytes that each token moves beside products and
               attention
    step       synchronisations of a step, by the lines that cause them; kernels launched, and the
               milliseconds that device and CPU take
    ours       r 64 on all matrices at 2,048 tokens
    peer       HF Trainer + peft on a Qwen2 of the same shape, with the same adapter and batch
    ours       r 8 as in lora_zero2.yaml, compiled (--first ends here)
    peer       with one row, with and without activation checkpointing
    official   batch 1, accumulation 8, LoRA r 64, all blocks recomputed, 8,192 to 256 tokens; the
               same with embedding and head trained whole. GB and seconds stand beside those in the
               README of QwenLM/Qwen (one A100-SXM4-80G)
    others     r 64 compiled, and a step of it looked into, twice the rows, one row
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    # By itself Python looks beside this script, where serve.py hides a package of ours; and a
    # package called tests that a library has installed would hide this one.
    sys.path[0] = str(ROOT)
    sys.modules["tests"] = package = types.ModuleType("tests")
    package.__path__ = [str(ROOT / "tests")]

from tests.benchmarks.gpu_plan import (  # noqa: E402
    PATIENCE,
    Measurement,
    Plan,
    first_part,
    second_part,
    with_half_the_rows,
)
from tests.benchmarks.gpu_processes import take_answers  # noqa: E402
from tests.benchmarks.gpu_results import OUT_OF_MEMORY, Results, report  # noqa: E402
from tests.benchmarks.gpu_runs import Run, run_measurements  # noqa: E402

MINUTES, FIRST_MINUTES = 9.0, 3.9


def measure_all(
    run: Run, plan: Plan, measurements: Sequence[Measurement], device: str
) -> list[Measurement]:
    """Take the figures of all measurements; what was tried, in order.

    One that did not fit is followed by the same with half the rows.
    """
    tried, waiting = list[Measurement](), deque(measurements)
    while waiting:
        measurement = waiting.popleft()
        tried.append(measurement)
        question = {"plan": asdict(plan), "device": device, **asdict(measurement)}
        least = measurement.seconds
        run.measure(
            measurement.name, question, least=least, most=PATIENCE * least, is_last=not waiting
        )
        smaller = with_half_the_rows(measurement)
        is_too_large = run.results.found.get(measurement.name, {}).get("remark") == OUT_OF_MEMORY
        if smaller and is_too_large and smaller not in [*tried, *waiting]:
            waiting.appendleft(smaller)
    return tried


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", action="store_true", help="the checks and the goals alone")
    parser.add_argument("--only", default="", help="what has this text in its name")
    parser.add_argument("--list", action="store_true", help="show the plan and end")
    parser.add_argument("--json", type=Path, default=Path("gpu.jsonl"), help="file of the results")
    parser.add_argument(
        "--minutes", type=float,
        help=f"end after so many ({MINUTES}; with --first {FIRST_MINUTES})",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--plan", type=json.loads, default={}, help="other sizes, as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(
    arguments: Sequence[str] | None = None,
    command: Sequence[str] = (sys.executable, __file__, "--worker"),
) -> int:
    """Measure and print the tables; the exit code. `command` starts a process that measures."""
    options = parse(arguments)
    if options.worker:
        answers = take_answers()  # before libraries are imported, which may print
        from tests.benchmarks.gpu_answers import answer_one
        from tests.benchmarks.gpu_worker import answer

        answer_one(answer, answers)
    plan = Plan.of(options.plan)
    measurements = [*first_part(plan), *(() if options.first else second_part(plan))]
    measurements = [each for each in measurements if options.only in each.name]
    if options.list:
        for number, each in enumerate(measurements, 1):
            print(f"{number:3}  {each.name:<48}about {each.seconds} s")
        return 0
    minutes = options.minutes or (FIRST_MINUTES if options.first else MINUTES)

    def work(run: Run) -> None:
        measurements[:] = measure_all(run, plan, list(measurements), options.device)

    def shown(results: Results) -> str:
        return report(results, measurements)

    return run_measurements(options.json, asdict(plan), command, minutes, work, shown)


if __name__ == "__main__":
    sys.exit(main())
