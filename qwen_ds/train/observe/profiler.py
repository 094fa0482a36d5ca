"""The time of a few steps, split into parts: torch's profiler over log.profile_steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, tensorboard_trace_handler

from qwen_ds import dist
from qwen_ds.disk.write import write_json
from qwen_ds.runlog import say

PARTS = ("data", "forward", "backward", "optimizer")
# Beginnings of the names that torch gives to its backends' collectives.
_COLLECTIVES = ("gloo:", "nccl:", "nccldevkernel")


@dataclass(slots=True)
class StepProfiler:
    """Profiler of the steps from `steps[0]` to `steps[1]` (1-based, both included); None: no step.

    Only rank 0 writes: a trace for TensorBoard, and profile.json. After each part of a profiled
    step the CPU waits for the GPU, whose work would otherwise be charged to whichever part happens
    to wait. Such steps are a little slower.
    """

    steps: tuple[int, int] | None
    folder: Path
    device: torch.device
    _profile: profile | None = None
    _began: float = 0.0
    _parts: dict[str, float] = field(default_factory=dict)

    def begin_step(self, number: int) -> None:
        if self.steps and number == self.steps[0]:
            on_gpu = self.device.type == "cuda"
            self._profile = profile(
                activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
            )
            self._profile.start()
            self._parts = dict.fromkeys(PARTS, 0.0)
            self._began = self._now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what runs within as one of PARTS."""
        began = self._now() if self._profile else 0.0
        with record_function(f"step: {name}") if self._profile else nullcontext():
            yield
        if self._profile:
            self._parts[name] += self._now() - began

    def end_step(self, number: int) -> None:
        if self._profile is None or self.steps is None or number != self.steps[1]:
            return
        seconds = self._now() - self._began
        profiled, self._profile = self._profile, None
        profiled.stop()
        if dist.rank() != 0:
            return
        tensorboard_trace_handler(str(self.folder), worker_name="rank0")(profiled)
        parts = self._parts | {"other": seconds - sum(self._parts.values())}
        # It lies within the parts, and beside the computation where the two overlap.
        communication = _under_way(profiled.events())
        first, last = self.steps
        split = {"first_step": first, "last_step": last, "seconds": seconds, "parts": parts}
        write_json(self.folder / "profile.json", split | {"communication": communication})
        shares = (f"{name} {100 * value / seconds:.1f} %" for name, value in parts.items())
        say(
            f"profiled steps {first} to {last}, {seconds:.2f} s: {', '.join(shares)}; "
            f"communication under way {100 * communication / seconds:.1f} %; {self.folder} holds "
            f"the trace (tensorboard --logdir {self.folder})"
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _under_way(events: Any) -> float:
    """Seconds in which at least one collective ran."""
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events or ()
        if event.name.lower().startswith(_COLLECTIVES)
    )
    total, covered = 0.0, float("-inf")
    for start, end in ranges:  # microseconds
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total / 1e6
