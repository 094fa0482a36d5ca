"""What a GPU does, and how often Python waits for it, as torch tells it, for gpu.py and
gpu_serve.py."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[2]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def activities(device: torch.device) -> list[ProfilerActivity]:
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return [ProfilerActivity.CPU, *on_gpu]


def kernels(found: profile, device: torch.device) -> list[tuple[str, float]]:
    """Kernels by their milliseconds, the longest first; on a CPU operators.

    An operator's device time is that of its kernels, which have events of their own: each is
    counted once.
    """
    on_gpu = device.type == "cuda"
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    seen = [
        (event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000)
        for event in found.key_averages()
        if event.device_type == wanted and not event.is_user_annotation
    ]
    return sorted(seen, key=lambda each: -each[1])


def synchronisations(step: Callable[[], object], device: torch.device) -> Counter[str]:
    """How often a step waits for the device, by the innermost line of this repository, and the
    innermost line of all, that does so; what torch's own switch tells of."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, *others: object) -> None:
        if "called a synchronizing" not in str(message):
            return
        stack = traceback.extract_stack()[:-1]
        while stack and stack[-1].filename.endswith("warnings.py"):
            stack.pop()
        ours = [frame for frame in stack if Path(frame.filename).is_relative_to(ROOT / "qwen_ds")]
        shown = {f"{Path(f.filename).name}:{f.lineno} {f.line}": 0 for f in (*ours[-1:], stack[-1])}
        found[" > ".join(shown)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # catch_warnings brings back torch's and Python's own
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")  # which warns of itself, the first time
        try:
            step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return found
