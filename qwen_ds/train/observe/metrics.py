"""Numbers of finished steps: one line of metrics.jsonl, memory, and the share of the GPUs' peak."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qwen_ds import dist
from qwen_ds.data.batches import WindowStatistics
from qwen_ds.plan.flops import step_flops, utilisation
from qwen_ds.plan.gpus import Gpu, recognise
from qwen_ds.plan.shape import Shape


@dataclass(frozen=True, slots=True)
class Step:
    """One finished optimizer step, all ranks together."""

    number: int  # 1-based
    epoch: int
    loss: float  # sum over the target tokens, nats
    targets: int
    lr: float
    grad_norm: float
    overflows: int  # of fp16, since the run began
    window: WindowStatistics


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices of a run and its model: they turn tokens and seconds into a share of the peak."""

    ranks: int
    shape: Shape
    method: Literal["lora", "full"]
    gpu: Gpu | None  # None where no peak is known, as for a CPU

    @classmethod
    def of(cls, device: torch.device, shape: Shape, method: Literal["lora", "full"]) -> Hardware:
        gpu = recognise(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return cls(dist.world_size(), shape, method, gpu)


def metrics(steps: list[tuple[Step, float]], hardware: Hardware) -> dict[str, Any]:
    """One line of metrics over some steps, each with its seconds.

    The loss is in nats per target token. Tokens are those of all ranks, without padding;
    rank_imbalance is that of the worst step. mfu (model FLOP utilisation, where the GPU's peak is
    known): the operations that the model needs (4 N a token for LoRA, 6 N for full training, see
    plan/flops.py) over those that the GPUs could do in that time. Memory: see `allocator`.
    """
    last = steps[-1][0]
    seconds = max(sum(s for _, s in steps), 1e-9)
    tokens = sum(step.window.tokens for step, _ in steps)
    targets = sum(step.targets for step, _ in steps)
    row = {
        "epoch": last.epoch,
        "loss": sum(step.loss for step, _ in steps) / targets,
        "lr": last.lr,
        # JSON has no infinity, which is the norm of an fp16 overflow.
        "grad_norm": last.grad_norm if math.isfinite(last.grad_norm) else None,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_rank": tokens / seconds / hardware.ranks,
        "learnt_tokens_per_second": targets / seconds,
        "padding_share": 1.0 - tokens / sum(step.window.padded_tokens for step, _ in steps),
        "rank_imbalance": max(step.window.imbalance for step, _ in steps),
        "memory_gb": peak_memory_gb(),
        **allocator(),
        "seconds": seconds,
    }
    if hardware.gpu is not None:
        needed = sum(
            step_flops(
                hardware.shape, method=hardware.method, tokens=step.window.tokens,
                targets=step.targets, squared_tokens=step.window.squared_tokens,
            )
            for step, _ in steps
        )  # fmt: skip
        row["mfu"] = utilisation(needed, seconds, hardware.ranks, hardware.gpu)
    return row | ({"fp16_overflows": last.overflows} if last.overflows else {})


def allocator() -> dict[str, float]:
    """Peak of the memory that torch has taken from this rank's GPU, in 10^9 bytes, and how often it
    had to give some back and try again since the run began; nothing on a CPU.

    The allocator's own counts: the GPU is not waited for. Memory reserved far above memory_gb is
    fragmented; retries cost time, and announce the end of the memory.
    """
    if not torch.cuda.is_initialized():
        return {}
    found = torch.cuda.memory_stats()
    return {
        "reserved_gb": found["reserved_bytes.all.peak"] / 1e9,
        "alloc_retries": found["num_alloc_retries"],
    }


def peak_memory_gb() -> float:
    """Peak memory of this rank in 10^9 bytes: of its GPU, or of the process on a CPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
