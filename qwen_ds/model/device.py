"""The device of a command that runs a model without training it."""

from __future__ import annotations

import torch

from qwen_ds.machine import choose_device
from qwen_ds.model.attention_kernels import without_cudnn_attention


def take_device(wanted: str, number: int | None = None) -> torch.device:
    """The device that computes (see `choose_device`), made this process's own, where rows may have
    any length: without cuDNN's attention.

    What names no GPU, as torch.cuda's streams, its memory figures and the libraries' workspaces,
    is then on this one, and no other process's GPU gets a context of ours.
    """
    device = choose_device(wanted, number)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        without_cudnn_attention()
    return device
