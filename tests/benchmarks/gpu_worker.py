"""The process that measures one thing for gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

import torch

from qwen_ds.machine import let_segments_grow
from qwen_ds.model.attention_kernels import without_cudnn_attention
from tests.benchmarks.gpu_answers import Question, Say, measured
from tests.benchmarks.gpu_checks import check_attention
from tests.benchmarks.gpu_ours import measure_ours
from tests.benchmarks.gpu_peer import measure_peer
from tests.benchmarks.gpu_plan import Plan, Setting
from tests.benchmarks.gpu_step import check_block, check_step

KINDS: dict[str, Callable[[Plan, Setting, torch.device, Say], None]] = {
    "attention": check_attention,
    "block": check_block,
    "step": check_step,
    "ours": measure_ours,
    "peer": measure_peer,
}


def answer(question: Question, out: TextIO) -> bool:
    """Write the figures that the question asks for; see `measured`."""
    if question["kind"] in ("block", "step", "ours"):  # as training does, before CUDA starts
        let_segments_grow()
        without_cudnn_attention()
    return measured(_measure, question, out)


def _measure(question: Question, device: torch.device, say: Say) -> None:
    asked = question["setting"]
    setting = Setting(**asked | {"targets": tuple(asked["targets"])})
    KINDS[question["kind"]](Plan.of(question["plan"]), setting, device, say)
