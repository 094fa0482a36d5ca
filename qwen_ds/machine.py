"""Resources of this machine: its device, its memory, the speed of its bf16."""

from __future__ import annotations

import ctypes
import os
from collections.abc import MutableMapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qwen_ds import dist
from qwen_ds.errors import UserError


@cache
def has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices faster than fp32 ones.

    An x86 without a matrix unit (AMX) is slower: on one core, products of 1,024 x 512 x 1,376 ran
    at 87 GFLOP/s in bf16 and at 165 in fp32.
    """
    # An older torch has no get_capabilities.
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found.get("architecture") != "x86_64" or bool(found.get("amx_bf16", False))


def choose_device(wanted: str) -> torch.device:
    """The device of this rank: its own GPU where there is one, else the CPU.

    `wanted` is auto, cuda or cpu. auto never falls back to the CPU beside an NVIDIA card that torch
    cannot use, since a run on the CPU by accident would look like a hang.

    Raises UserError for more ranks than GPUs, and where a GPU is missing or cannot be used.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        rank, count = dist.local_rank(), torch.cuda.device_count()
        if rank >= count:
            raise UserError(
                f"local rank {rank} has no GPU: {count} on this machine; expected at most {count} "
                "ranks here (--num_gpus)"
            )
        return torch.device("cuda", rank)
    if nvidia_card_present():
        raise UserError(
            f"torch {torch.__version__} (built for: {torch.version.cuda or 'no CUDA at all'}) "
            "cannot use this machine's NVIDIA GPU; expected a newer driver, another torch build, a "
            "CUDA_VISIBLE_DEVICES that is not empty, or --device cpu (see docs/training.md, "
            "drivers and CUDA)"
        )
    if wanted == "cuda":
        raise UserError(
            "--device cuda: this machine shows no NVIDIA GPU; expected one, or --device cpu"
        )
    return torch.device("cpu")


def nvidia_card_present() -> bool:
    """Whether the system has an NVIDIA GPU, even one that torch cannot use."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


# torch reads the first of these that is set when CUDA starts. Before 2.11 it ignored
# expandable_segments in the newer one (PyTorch issue 183387).
ALLOCATOR_VARIABLES = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
_VIRTUAL_MEMORY_SUPPORTED = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's CUDA allocator extend the blocks that it has, before CUDA starts.

    Micro-batches differ in shape. Without it the allocator keeps a block for every size that it has
    met and runs out of memory long before all of it is in use. A value of the user's stays as it
    is. Nothing is set where the driver cannot map memory by itself, as on some virtual GPUs.
    """
    if any(name in environment for name in ALLOCATOR_VARIABLES) or not _maps_memory():
        return
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    environment[ALLOCATOR_VARIABLES[release >= (2, 11)]] = "expandable_segments:True"


def _maps_memory() -> bool:
    """Whether torch is built for CUDA, and every GPU that it sees has virtual memory management."""
    if torch.version.cuda is None:
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count, found = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return False
    attribute = ctypes.byref(found), _VIRTUAL_MEMORY_SUPPORTED
    # A GPU's handle is its number. A call that succeeds returns 0.
    return all(
        driver.cuDeviceGetAttribute(*attribute, gpu) == 0 and found.value == 1
        for gpu in range(count.value)
    )


def available_memory() -> int:
    """Bytes that this process may still take of its machine, or container where that is less."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
        free = {name: int(value) * 1024 for name, value, *_ in lines}["MemAvailable:"]
    else:  # not Linux: half of the machine's memory, a guess
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    allowed = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    if allowed != "max" and used.is_file():
        free = min(free, int(allowed) - int(used.read_text(encoding="ascii")))
    return free
