"""Rates and memory of GPUs, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One model of GPU."""

    key: str  # its name on the command line
    marks: tuple[str, ...]  # lower-case words that all occur in CUDA's name for it
    flops: float
    """Dense peak in bf16 with fp32 accumulation, operations a second (V100 and T4: fp16)."""
    memory_gb: float
    bandwidth: float  # memory bandwidth, bytes a second
    link: float
    """Bandwidth to the other GPUs of its machine, one direction, bytes a second: NVLink, or PCI
    Express where there is none."""
    has_bf16: bool = True  # False: it emulates bf16


_PCIE_4, _PCIE_5 = 32e9, 64e9
# From NVIDIA's data sheets, figures "with sparsity" halved. The first match wins: of GPUs with a
# common mark the one with more marks comes first.
GPUS = (
    Gpu("b200", ("b200",), 2250e12, 180, 8.0e12, 900e9),
    Gpu("h200", ("h200",), 989e12, 141, 4.8e12, 450e9),
    Gpu("gh200", ("gh200",), 989e12, 96, 4.0e12, 450e9),
    Gpu("h100-nvl", ("h100", "nvl"), 835e12, 94, 3.9e12, 300e9),
    Gpu("h100-pcie", ("h100", "pcie"), 756e12, 80, 2.0e12, _PCIE_5),
    Gpu("h100", ("h100",), 989e12, 80, 3.35e12, 450e9),
    Gpu("h800", ("h800",), 989e12, 80, 3.35e12, 200e9),
    Gpu("h20", ("h20",), 148e12, 96, 4.0e12, 450e9),
    Gpu("a100-40", ("a100", "40gb"), 312e12, 40, 1.555e12, 300e9),
    Gpu("a100", ("a100",), 312e12, 80, 2.039e12, 300e9),
    Gpu("a800", ("a800",), 312e12, 80, 2.039e12, 200e9),
    Gpu("a40", ("a40",), 149.7e12, 48, 0.696e12, _PCIE_4),
    Gpu("a30", ("a30",), 165e12, 24, 0.933e12, _PCIE_4),
    Gpu("a10", ("a10",), 125e12, 24, 0.6e12, _PCIE_4),
    Gpu("a6000", ("rtx a6000",), 154.8e12, 48, 0.768e12, _PCIE_4),
    Gpu("l40s", ("l40s",), 362e12, 48, 0.864e12, _PCIE_4),
    Gpu("l40", ("l40",), 181e12, 48, 0.864e12, _PCIE_4),
    Gpu("l20", ("l20",), 119.5e12, 48, 0.864e12, _PCIE_4),
    Gpu("l4", ("l4",), 121e12, 24, 0.3e12, _PCIE_4),
    Gpu("rtx5090", ("rtx 5090",), 209.5e12, 32, 1.792e12, _PCIE_5),
    Gpu("rtx4090", ("rtx 4090",), 165.2e12, 24, 1.008e12, _PCIE_4),
    Gpu("rtx3090", ("rtx 3090",), 71e12, 24, 0.936e12, _PCIE_4),
    Gpu("v100", ("v100",), 125e12, 32, 0.9e12, 150e9, has_bf16=False),
    Gpu("t4", ("t4",), 65e12, 16, 0.32e12, 16e9, has_bf16=False),
)


def gpu_named(key: str) -> Gpu | None:
    """The GPU with this key, or None."""
    return next((gpu for gpu in GPUS if gpu.key == key), None)


def recognise(device_name: str) -> Gpu | None:
    """The GPU with this CUDA name ("NVIDIA A100-SXM4-80GB"), or None if it is not listed."""
    words = f" {device_name.lower().replace('-', ' ')} "
    return next((gpu for gpu in GPUS if all(f" {mark} " in words for mark in gpu.marks)), None)
