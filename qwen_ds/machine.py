"""Resources of this machine: its device, its memory, the kind of its CPU."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import sysconfig
from collections.abc import MutableMapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from qwen_ds import dist
from qwen_ds.errors import UserError


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs: on a CPU a C++ compiler; on a GPU Triton, which
    compiles a module of C for Python at its first kernel. torch takes it from compute capability
    7.0 on; Triton itself names 8.0."""
    if device.type != "cuda":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    compilers = (os.environ.get("CC"), "gcc", "clang")
    has_compiler = any(shutil.which(name) for name in compilers if name)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not has_compiler or not headers.is_file() or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def has_bf16_units(device: torch.device) -> bool:
    """Whether the GPU computes in bf16 itself, as torch has it: AMD's, NVIDIA's from Ampere on."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def choose_device(wanted: str, number: int | None = None) -> torch.device:
    """The device of this process: its own GPU where there is one, else the CPU.

    `wanted` is auto, cuda or cpu. auto never falls back to the CPU beside an NVIDIA card that torch
    cannot use, since a run on the CPU by accident would look like a hang. `number` is that of the
    GPU; None: the local rank's.

    Raises UserError for more ranks than GPUs, and where a GPU is missing or cannot be used.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        rank = dist.local_rank() if number is None else number
        count = torch.cuda.device_count()
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


# In /proc/cpuinfo, what a compiler's -march=native goes by: x86 first, then Arm.
_CPU_KEYS = {
    "vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features",
}  # fmt: skip


@cache
def cpu_kind() -> str:
    """A name for all CPUs with the instructions of this one, such as "x86_64-3fa9c2e1"."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else platform.processor()
    return f"{platform.machine()}-{_cpu_digest(text)}"


def _cpu_digest(text: str) -> str:
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    found = {key.strip(): sorted(value.split()) for key, _, value in pairs}
    known = json.dumps({key: found.get(key) for key in sorted(_CPU_KEYS)})
    return hashlib.sha256((known if found.keys() & _CPU_KEYS else text).encode()).hexdigest()[:8]


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
