"""The tour of `make demo`: fine-tune, evaluate, merge and report, by the commands of a user.

    python -m qwen_ds.demo

The commands write to a log file; the terminal shows the commands, their progress and the results.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwen_ds.demo import corpus
from qwen_ds.errors import EXIT_DONE, EXIT_FAILURE
from qwen_ds.recipe.parser import parse_options
from qwen_ds.recipe.ranges import PositiveInt
from qwen_ds.runlog import run_command
from qwen_ds.terminal import overwrite_line, show

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = "launch/recipes/demo.yaml"
DEFAULT_OUTPUT = "runs/demo"
SAMPLES = 3
BASE, RESULT = "base", "fine-tuned"  # as the evaluation names them
REQUIRE = ("--require", "stop_rate>=0.99", "seed.rouge-l>=0.4")
SHOWN = ("seed.rouge-1", "seed.rouge-2", "seed.rouge-l", "seed.bleu-4", "stop_rate", "perplexity")
LOG_LINES = 15
SECONDS_BETWEEN_LINES = 20.0

Rows = list[dict[str, Any]]


class StepFailed(Exception):
    """A command ended with an exit code other than 0."""


@dataclass(slots=True)
class Shell:
    """Runs the tour's commands in the repository; their output goes to `log`."""

    log: Path
    shows_progress_in_place: bool

    def run(
        self,
        words: Sequence[str],
        progress: Callable[[], str] | None = None,
        exit_code: int = EXIT_DONE,
    ) -> None:
        """Run one command and wait; from time to time show the line that `progress` returns.

        Raises StepFailed if it ends with another exit code.
        """
        show(f"  $ {shlex.join(words)}")
        python, environment = Path(sys.executable), {"OMP_NUM_THREADS": "1"} | os.environ
        program = python if words[0] == "python" else python.with_name(words[0])
        command = [str(program), *words[1:]]
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {shlex.join(words)}\n")
            log.flush()
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                self._wait(process, progress)
            finally:
                # Only if we are interrupted. The launcher passes the signal on to its ranks.
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if process.returncode != exit_code:
            raise StepFailed(f"{' '.join(words)} ended with exit code {process.returncode}")

    def _wait(self, process: subprocess.Popen[bytes], progress: Callable[[], str] | None) -> None:
        shown, shown_at = "", time.monotonic()
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
            line = progress() if progress else ""
            if not line or line == shown:
                continue
            if self.shows_progress_in_place:
                overwrite_line(f"  {line}", len(shown) + 2)
                shown = line
            elif time.monotonic() - shown_at > SECONDS_BETWEEN_LINES:
                show(f"  {line}")
                shown, shown_at = line, time.monotonic()
        if self.shows_progress_in_place and shown:
            overwrite_line("", len(shown) + 2)


def shown(path: Path) -> Path:
    """The path as seen from the repository, where the commands run."""
    return path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path


def free_folder(folder: Path) -> Path:
    """The folder itself, or the first of NAME-2, NAME-3 .. that does not exist."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([folder], numbered) if not free.exists())


def read_lines(file: Path) -> Rows:
    """The objects of the complete lines of a file of JSON lines, which may still be growing."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def training_steps(run: Path) -> Rows:
    """The steps so far, from metrics.jsonl."""
    file = run / "metrics.jsonl"
    return [row for row in read_lines(file) if "loss" in row] if file.is_file() else []


def progress_line(run: Path, total_steps: int) -> str:
    """The progress of training in one line; empty before its first step."""
    if not (steps := training_steps(run)):
        return ""
    last = steps[-1]
    speed = f"{last['tokens_per_second']:.0f} tokens/s"
    return f"step {last['step']}/{total_steps}  loss {last['loss']:.3f}  {speed}"


def score_table(comparison: dict[str, Any]) -> str:
    """Scores of comparison.json with their 95 % intervals, the base's and the result's, and p of
    the difference."""
    lines = [f"  {'':<14}{BASE:^26}{RESULT:^26}{'p':>7}"]
    for name in SHOWN:
        sides = [comparison["scores"][name][side] for side in (BASE, RESULT)]
        cells = [f"{value:.3f}  {low:.3f} to {high:.3f}" for value, low, high in sides]
        p = comparison["paired"][name][RESULT]["p"]
        lines.append(f"  {name:<14}{cells[0]:^26}{cells[1]:^26}{p:>7.3f}")
    return "\n".join(lines)


def side_by_side(before: Rows, after: Rows, contents: Sequence[str]) -> str:
    """Attributes, reference, and the answers before and after, of evenly spaced rows."""
    picked = [i * (len(contents) - 1) // (SAMPLES - 1) for i in range(SAMPLES)]
    return "\n".join(
        f"  {contents[i]}\n"
        f"    reference  {before[i]['reference']}\n"
        f"    before     {before[i]['prediction']}\n"
        f"    after      {after[i]['prediction']}"
        for i in picked
    )


def tour(shell: Shell, run: Path, num_gpus: int, deepspeed_json: str | None) -> None:
    """Run all steps in order, and print the result of each."""
    started = time.monotonic()
    folder = REPOSITORY / run

    show("1. Fine-tune with LoRA: from a shop catalogue's style to a lyrical one")
    base, training, rows = _fine_tune(shell, run, num_gpus, deepspeed_json)
    losses = [row["loss"] for row in training_steps(folder)]
    seconds = time.monotonic() - started
    show(f"  {len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}, {seconds:.0f} s\n")

    show("2. Evaluate the base and the result on rows that neither saw; the result must reach this")
    compare = ["--compare", f"{BASE}={base}", f"{RESULT}={run}/adapter", "--model", base]
    data = ["--data", rows, "--training", training]
    evaluate = ["python", "-m", "serve.evaluate"]
    shell.run([*evaluate, *compare, *data, "--output_dir", f"{run}/eval", *REQUIRE])
    scored = folder / "eval"
    show(f"\n{score_table(json.loads((scored / 'comparison.json').read_text()))}")
    show(f"  {corpus.EVAL_ITEMS} rows; 95 % intervals; p of the difference, row by row\n")
    contents = [row["content"] for row in read_lines(Path(rows))]
    before, after = (read_lines(scored / side / "predictions.jsonl") for side in (BASE, RESULT))
    show(side_by_side(before, after, contents))

    show("\n3. Ask the same of the base's answers: they miss it")
    given = ["--predictions", f"{run}/eval/{BASE}/predictions.jsonl"]
    # Beside the run, whose page tells what the result reaches.
    beside = ["--output_dir", f"{run}-base", "--overwrite", "true"]
    gate = [*evaluate, *given, *beside, *REQUIRE]
    shell.run(gate, exit_code=EXIT_FAILURE)

    show("\n4. Merge the adapter; the model card tells the scores; put all of the run on one page")
    merge = ["python", "launch/merge.py", "--base", base]
    shell.run([*merge, "--adapter", f"{run}/adapter", "--output", f"{run}/merged"])
    shell.run(["python", "-m", "qwen_ds.report", str(run)])
    show(
        f"\nreport       {run}/report.html\n"
        f"model        {run}/merged, and its card {run}/merged/README.md\n"
        f"TensorBoard  tensorboard --logdir {run.parent}\n"
        f"log          {shown(shell.log)}\n"
        f"done in {time.monotonic() - started:.0f} s"
    )


def _fine_tune(
    shell: Shell, run: Path, num_gpus: int, deepspeed_json: str | None
) -> tuple[str, str, str]:
    """Train; returns the base, and the training and evaluation rows that the resolved recipe
    names."""
    launch = ["deepspeed", "--num_gpus", str(num_gpus), "launch/train.py"]
    if str(run) != DEFAULT_OUTPUT or deepspeed_json:
        launch += ["--config", RECIPE, "--output_dir", str(run)]
        launch += ["--deepspeed", deepspeed_json] if deepspeed_json else []
    recipe = yaml.safe_load((REPOSITORY / RECIPE).read_text(encoding="utf-8"))
    steps_per_epoch = -(-corpus.TRAIN_ITEMS // recipe["batch"]["rows_per_step"])
    total_steps = recipe["optim"]["epochs"] * steps_per_epoch
    folder = REPOSITORY / run
    shell.run(launch, lambda: progress_line(folder, total_steps))
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    return resolved["model"]["path"], resolved["data"]["train"][0], resolved["data"]["eval"][0]


@dataclass(frozen=True)
class DemoOptions:
    """How the demo runs."""

    num_gpus: PositiveInt = 2
    """Ranks: GPUs where there are any, else CPU processes."""
    deepspeed: str | None = None
    """DeepSpeed JSON. Unset: the recipe's own."""
    output_dir: str = DEFAULT_OUTPUT
    """Run folder in the repository."""


def main() -> int:
    about = "The embedded demo: fine-tune, merge and evaluate a tiny Qwen."
    options = parse_options(DemoOptions, about)
    folder = free_folder(REPOSITORY / options.output_dir)
    run, log = shown(folder), folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.open("w").close()
    try:
        tour(Shell(log, sys.stdout.isatty()), run, options.num_gpus, options.deepspeed)
    except StepFailed as failure:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        why = f"{failure}; the whole log is {shown(log)}"
        show(*lines, why, sep="\n", err=True)
        return EXIT_FAILURE
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
