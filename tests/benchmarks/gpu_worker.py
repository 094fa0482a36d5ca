"""A process that measures one thing for gpu.py: imports first, then waits for its question."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TextIO

import torch

from qwen_ds.machine import choose_device
from tests.benchmarks.gpu_checks import check_attention
from tests.benchmarks.gpu_ours import measure_ours
from tests.benchmarks.gpu_peer import measure_peer
from tests.benchmarks.gpu_plan import Plan, Setting
from tests.benchmarks.gpu_processes import END
from tests.benchmarks.gpu_results import OUT_OF_MEMORY
from tests.benchmarks.gpu_step import check_block, check_step

Say = Callable[[dict[str, Any]], None]
Measure = Callable[[Plan, Setting, torch.device, Say], None]
KINDS: dict[str, Measure] = {
    "attention": check_attention,
    "block": check_block,
    "step": check_step,
    "ours": measure_ours,
    "peer": measure_peer,
}
# How CUDA's libraries say it where torch's allocator does not.
_WORDS_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def answer_one(answers: TextIO) -> NoReturn:
    """Answer one question from standard input, and end the process."""
    line = sys.stdin.readline()
    if line:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        answer(json.loads(line), answers)
    # At once: teardown of a process group or of a compiler may take seconds, or hang.
    os._exit(0)


def _end_with_parent() -> None:
    sys.stdin.read()  # until the other end closes, however the process there ends
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)


def answer(question: Mapping[str, Any], out: TextIO) -> None:
    """Write the figures that the question asks for, a JSON line each, and END.

    No END after an error that is no lack of memory: that one goes to the log, and its last line is
    a remark.
    """
    plan = Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in question["plan"].items()})
    asked = question["setting"]
    setting = Setting(**asked | {"targets": tuple(asked["targets"])})

    def say(figures: dict[str, Any]) -> None:
        out.write(json.dumps(figures) + "\n")
        out.flush()

    device = choose_device(question["device"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    torch.manual_seed(0)
    try:
        KINDS[question["kind"]](
            plan, setting, device, lambda figures: say({**figures, "device": name})
        )
    except Exception as error:
        traceback.print_exc()
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        is_memory = isinstance(error, torch.OutOfMemoryError) or any(
            each in str(error) for each in _WORDS_OF_MEMORY
        )
        say({"remark": OUT_OF_MEMORY if is_memory else words, "device": name})
        if not is_memory:
            sys.stderr.flush()
            os._exit(1)
    say(END)
