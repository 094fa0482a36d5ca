"""A process that measures one thing: imports first, then waits for its question. See
gpu_processes.py."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TextIO

import torch

from qwen_ds.errors import UserError
from qwen_ds.machine import choose_device
from tests.benchmarks.gpu_processes import END, FAILED, REFUSED, end_with_parent
from tests.benchmarks.gpu_results import OUT_OF_MEMORY

Question = Mapping[str, Any]
Say = Callable[[dict[str, Any]], None]
Measure = Callable[[Question, torch.device, Say], None]
# How CUDA's libraries say it where torch's allocator does not.
_WORDS_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def answer_one(answer: Callable[[Question, TextIO], bool], answers: TextIO) -> NoReturn:
    """Answer one question from standard input, and end the process."""
    line, is_well = sys.stdin.readline(), True
    if line:
        threading.Thread(target=end_with_parent, daemon=True).start()
        is_well = answer(json.loads(line), answers)
    sys.stderr.flush()
    # At once: teardown of a process group or of a compiler may take seconds, or hang.
    os._exit(0 if is_well else 1)


def measured(measure: Measure, question: Question, out: TextIO) -> bool:
    """Write the figures that the question asks for, a JSON line each, and END.

    An error other than a lack of memory goes to the log, and there is FAILED in place of END; the
    answer is False then.
    """

    def say(figures: dict[str, Any]) -> None:
        out.write(json.dumps(figures) + "\n")
        out.flush()

    try:
        device = choose_device(question["device"])
    except UserError as error:
        say({REFUSED: str(error)})
        return False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    torch.manual_seed(0)
    try:
        measure(question, device, lambda figures: say({**figures, "device": name}))
    except Exception as error:
        traceback.print_exc()
        is_memory = isinstance(error, torch.OutOfMemoryError) or any(
            words in str(error) for words in _WORDS_OF_MEMORY
        )
        if not is_memory:
            say({FAILED: f"{type(error).__name__}: {error}".splitlines()[0]})
            return False
        say({"remark": OUT_OF_MEMORY, "device": name})
    say(END)
    return True
