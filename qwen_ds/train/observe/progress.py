"""How a run tells what it does: metrics.jsonl, TensorBoard, the progress bar, and the summary in words."""

from __future__ import annotations

import datetime
import logging
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig

from qwen_ds import dist
from qwen_ds.data.batches import WindowStatistics
from qwen_ds.plan.flops import step_flops, utilisation
from qwen_ds.plan.gpus import Gpu, recognise
from qwen_ds.plan.shape import Shape
from qwen_ds.runlog import JsonLines, is_terminal, say
from qwen_ds.train.observe.evaluation import Sample

log = logging.getLogger(__name__)

STEPS_UNTIL_ESTIMATE = 10


@dataclass(frozen=True, slots=True)
class Step:
    """One finished optimizer step, all ranks together."""

    number: int  # 1-based
    epoch: int
    loss: float  # sum over the targets, nats
    targets: int
    lr: float
    grad_norm: float
    overflows: int  # of fp16, since the start
    window: WindowStatistics


@dataclass(frozen=True, slots=True)
class Hardware:
    """What turns tokens and seconds into a share of what the devices can do."""

    ranks: int
    shape: Shape
    method: Literal["lora", "full"]
    gpu: Gpu | None
    """None: not one whose peak is known, such as a CPU."""

    @classmethod
    def of(cls, device: torch.device, model: Path, method: Literal["lora", "full"]) -> Hardware:
        gpu = recognise(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return cls(dist.world_size(), Shape.of(AutoConfig.from_pretrained(model)), method, gpu)

    def mfu(self, steps: Sequence[Step], seconds: float) -> float | None:
        """Model FLOP utilisation of these steps: operations that the model needs (4 N a token for LoRA, 6 N for full
        training, real tokens only, see flops.py) over what the GPUs could do in that time."""
        if self.gpu is None:
            return None
        needed = sum(
            step_flops(
                self.shape, method=self.method, tokens=step.window.tokens, targets=step.targets,
                squared_tokens=step.window.squared_tokens,
            )
            for step in steps
        )  # fmt: skip
        return utilisation(needed, seconds, self.ranks, self.gpu)


@dataclass(slots=True)
class Outcome:
    """What a finished run has to tell."""

    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0
    overflows: int = 0
    stopped_by: str | None = None  # why the run ended before its last step, to be gone on with
    out_of_patience: bool = False

    def __str__(self) -> str:
        rate = self.tokens / max(self.seconds, 1e-9)
        text = f"{self.steps} steps in {self.seconds:.0f} s, {rate:,.0f} tokens/s; "
        if self.first_loss is not None and self.last_loss is not None:
            text += f"loss {self.first_loss:.3f} -> {self.last_loss:.3f}"
        if self.eval_losses:
            text += (
                f"; evaluation loss {self.eval_losses[0][1]:.3f} -> {self.eval_losses[-1][1]:.3f}"
            )
        if self.out_of_patience:
            text += " (stopped early: eval.patience)"
        if self.skipped:
            text += f"; {self.skipped} steps had nothing to learn"
        if self.overflows:
            text += f"; {self.overflows} fp16 overflows"
        return text


class Progress:
    """Collects steps and writes a line of metrics every `log_every_steps`; only rank 0 writes or draws anything.

    Args:
        steps: of the whole run.
        first_step: 0, or the step after which a resumed run goes on.
        saved: what `state` gave at that step. Lines that were written after it are taken back.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        log_every_steps: int,
        hardware: Hardware,
        first_step: int = 0,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self._steps, self._every, self._first_step = steps, log_every_steps, first_step
        self._hardware = hardware
        self._writes = dist.rank() == 0
        saved = saved or {"metrics_bytes": 0, "samples_bytes": 0, "pending": [], "outcome": {}}
        if self._writes:
            self._lines = JsonLines(folder / "metrics.jsonl", saved["metrics_bytes"])
            self._samples = JsonLines(folder / "samples.jsonl", saved["samples_bytes"])
            self._board: SummaryWriter | None = SummaryWriter(
                str(folder / "tensorboard"), purge_step=first_step + 1
            )
        redraw_seconds = 0.2 if is_terminal() else 15.0
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            disable=not self._writes,
            mininterval=redraw_seconds,
            leave=False,
        )
        self._started = self._step_started = time.perf_counter()
        self._pending = [(_step(row), seconds) for row, seconds in saved["pending"]]
        self._outcome = Outcome(**saved["outcome"])
        self._seconds_before = self._outcome.seconds

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to write the same lines; {} on ranks that write none."""
        if not self._writes:
            return {}
        return {
            "metrics_bytes": self._lines.position(),
            "samples_bytes": self._samples.position(),
            "pending": [[asdict(step), seconds] for step, seconds in self._pending],
            "outcome": asdict(self.outcome()),
        }

    def begin_step(self) -> None:
        self._step_started = time.perf_counter()

    def end_step(self, step: Step) -> None:
        """Take in a finished step; a step without targets is counted and not averaged."""
        log.info(
            "step %d of %d: loss sum %.6g over %d targets",
            step.number,
            self._steps,
            step.loss,
            step.targets,
        )
        outcome = self._outcome
        outcome.steps, outcome.overflows = step.number, step.overflows
        outcome.tokens += step.window.tokens
        if step.targets:
            self._pending.append((step, time.perf_counter() - self._step_started))
        else:
            outcome.skipped += 1
        if step.number % self._every == 0 or step.number == self._steps:
            self.flush()
        self._bar.update()
        if step.number == self._first_step + STEPS_UNTIL_ESTIMATE and step.number < self._steps:
            left = (
                (time.perf_counter() - self._started)
                / STEPS_UNTIL_ESTIMATE
                * (self._steps - step.number)
            )
            ends = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=left)
            self._bar.clear()
            say(
                f"step {step.number} of {self._steps}; ends about {ends:%Y-%m-%d %H:%M %Z} ({_duration(left)} left)"
            )

    def flush(self) -> None:
        """Write what the steps since the last line add up to."""
        if not self._pending:
            return
        row = metrics(self._pending, self._hardware)
        self._outcome.last_loss = row["loss"]
        if self._outcome.first_loss is None:
            self._outcome.first_loss = row["loss"]
        self._write(self._pending[-1][0].number, row, "train")
        self._bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        self._pending = []

    def evaluated(self, step: int, loss: float) -> None:
        """Take in an evaluation loss (nats per learnt token)."""
        self._outcome.eval_losses.append((step, loss))
        perplexity = math.exp(loss) if loss < 700 else None  # NaN and what overflows are no JSON
        self._write(
            step,
            {"eval_loss": loss if math.isfinite(loss) else None, "eval_perplexity": perplexity},
            "eval",
        )

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """Take in the answers to a few rows."""
        if self._writes:
            for i, sample in enumerate(samples):
                self._samples.write({"step": step, **asdict(sample)})
                text = f"**{sample.prompt}**\n\n{sample.answer}\n\n*{sample.reference}*"
                tag = f"samples/{i + 1}"
                self._to_board("add_text", tag, text, step)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files and clear the bar, so that an error's line stands alone."""
        self._bar.close()
        if self._writes:
            self._lines.close()
            self._samples.close()
            self._to_board("close")

    def outcome(self) -> Outcome:
        """The run so far."""
        self._outcome.seconds = self._seconds_before + time.perf_counter() - self._started
        return self._outcome

    def _write(self, step: int, row: dict[str, Any], group: str) -> None:
        if not self._writes:
            return
        self._lines.write({"step": step, **row})
        for name, value in row.items():
            if value is None:
                continue
            tag = f"{group}/{name.removeprefix('eval_')}"
            self._to_board("add_scalar", tag, value, step)
        self._to_board("flush")

    def _to_board(self, method: str, *arguments: object) -> None:
        """TensorBoard's writer raises, in a later call, what the disk said to its thread: the curve ends there, the
        training does not."""
        if self._board is not None:
            try:
                getattr(self._board, method)(*arguments)
            except OSError as error:
                log.warning("TensorBoard's file is given up: %s", error)
                self._board = None


def _step(saved: dict[str, Any]) -> Step:
    return Step(**saved | {"window": WindowStatistics(**saved["window"])})


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def metrics(steps: list[tuple[Step, float]], hardware: Hardware) -> dict[str, Any]:
    """One line of metrics over some steps and their seconds. Loss is nats per learnt token over all of them; tokens are
    real ones of all ranks, never padding; a rank is a GPU where there are any; rank_imbalance is the worst step's."""
    last = steps[-1][0]
    seconds = max(sum(s for _, s in steps), 1e-9)
    tokens, targets = (
        sum(step.window.tokens for step, _ in steps),
        sum(step.targets for step, _ in steps),
    )
    row = {
        "epoch": last.epoch,
        "loss": sum(step.loss for step, _ in steps) / targets,
        "lr": last.lr,
        "grad_norm": last.grad_norm
        if math.isfinite(last.grad_norm)
        else None,  # fp16's overflow: inf is no JSON
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_rank": tokens / seconds / hardware.ranks,
        "learnt_tokens_per_second": targets / seconds,
        "padding_share": 1.0 - tokens / sum(step.window.padded_tokens for step, _ in steps),
        "rank_imbalance": max(step.window.imbalance for step, _ in steps),
        "memory_gb": peak_memory_gb(),
        "seconds": seconds,
    }
    mfu = hardware.mfu([step for step, _ in steps], seconds)
    row |= {} if mfu is None else {"mfu": mfu}
    return row | ({"fp16_overflows": last.overflows} if last.overflows else {})


def peak_memory_gb() -> float:
    """Largest memory of this rank so far, in 10^9 bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
