"""DeepSpeed's operations that are compiled on the machine at their first use: its CPU Adam, and the
CUDA quantiser of ZeRO-3's weights.

The first is plain C++: neither nvcc nor its version matters (tests/train/engine/test_compiled.py
holds DeepSpeed to that). Two things go wrong elsewhere. torch guards a build with a file that a
killed run leaves behind, and waits for it to go away for ever. And a build for one kind of CPU ends
a process on another with an illegal instruction, where both share a home.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.git_version_info import installed_ops
from torch import nn

from qwen_ds.disk.lock import holding
from qwen_ds.disk.place import building_below, cache_home, given_build_folder, require_folder
from qwen_ds.disk.write import write_text
from qwen_ds.errors import UserError
from qwen_ds.machine import cpu_kind
from qwen_ds.runlog import say

log = logging.getLogger(__name__)

_BUILT_FOR = "built_for.txt"
# A build takes half a minute; on a loaded machine with a slow disk, several.
BUILD_SECONDS = 20 * 60
_LOOK_SECONDS = 0.5


def cpu_adam(
    parameters: list[nn.Parameter], settings: dict[str, Any]
) -> deepspeed.ops.adam.DeepSpeedCPUAdam:
    """AdamW on the CPU beside a GPU, compiled now if this kind of machine has none yet.

    Raises UserError if it does not compile, or a build that is not ours is in the way.
    """
    needs = (
        "a C++ compiler and ninja (the extra gpu), or a DeepSpeed JSON without offload_optimizer"
    )
    with _building("cpu_adam", "offload_optimizer: DeepSpeed's CPU Adam", needs):
        return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)


def load_quantizer() -> None:
    """DeepSpeed's quantiser of weights, compiled now if this kind of machine has none yet.

    DeepSpeed would load it by itself, unguarded; now it finds it there.

    Raises UserError if it does not compile, or a build that is not ours is in the way.
    """
    needs = (
        "nvcc of torch's CUDA version and ninja (the extra gpu), or zero_quantized_weights false"
    )
    with _building("quantizer", "zero_quantized_weights: DeepSpeed's quantiser", needs):
        deepspeed.ops.op_builder.QuantizerBuilder().load(verbose=False)


@contextmanager
def _building(name: str, what: str, needs: str) -> Iterator[None]:
    """Have this process alone build or load the operation, unless it was built with DeepSpeed.
    UserError, with `what` and what it `needs`, if that fails."""
    with ExitStack() as held:
        if not installed_ops.get(name, False):
            held.enter_context(_alone(name))
        try:
            yield
        except RuntimeError as error:
            log.info("%s", error.__cause__)
            lines = str(error.__cause__ or error).splitlines()
            raise UserError(
                f"{what} does not compile here: {lines[0]}; expected {needs}"
            ) from error


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Hold the operation's folder; torch's own file in it is then in nobody's way."""
    given = given_build_folder()
    folder = (given or cache_home() / "compiled" / _kind()) / name
    require_folder(folder, make=True)
    with ExitStack() as held:
        _take_turns(folder, held)
        lock = folder / "lock"
        if given:
            _wait_for_others(lock)
            _check_built_for(folder)
        else:  # whoever builds in this folder holds our lock, which ends with its process
            lock.unlink(missing_ok=True)
            held.enter_context(building_below(folder.parent))
        write_text(folder / _BUILT_FOR, cpu_kind() + "\n")
        yield


def _kind() -> str:
    """A name for all that a build depends on."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return f"{python}_torch{torch.__version__}_deepspeed{deepspeed.__version__}_{cpu_kind()}"


def _take_turns(folder: Path, held: ExitStack) -> None:
    """Hold the folder until `held` ends, after the other ranks, runs and machines that do."""
    began, told = time.monotonic(), False
    while True:
        try:
            what = f"{folder}: DeepSpeed's {folder.name}"
            held.enter_context(holding(folder / ".turn", what, say))
            return
        except UserError as error:
            if not told and time.monotonic() - began > 10:
                say(f"waiting: {error}")
                told = True
            time.sleep(_LOOK_SECONDS)


def _wait_for_others(lock: Path) -> None:
    """Wait for another program's build in a folder of the user's, as long as there may be one."""
    told = False
    while True:
        try:
            seconds = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if seconds > BUILD_SECONDS:
            raise UserError(
                f"{lock}: is {seconds / 60:.0f} minutes old and was left by a build that was "
                "killed, for which torch would wait for ever; expected none: remove it, or unset "
                "TORCH_EXTENSIONS_DIR"
            )
        if not told:
            say(f"{lock}: waiting up to {BUILD_SECONDS // 60} minutes for another build to end")
            told = True
        time.sleep(_LOOK_SECONDS)


def _check_built_for(folder: Path) -> None:
    marker = folder / _BUILT_FOR
    built = (folder / f"{folder.name}.so").is_file() and marker.is_file()
    kind = marker.read_text(encoding="utf-8").strip() if built else cpu_kind()
    if kind != cpu_kind():
        raise UserError(
            f"{folder}: was built for another kind of CPU ({kind}; this one is {cpu_kind()}) and "
            "would end with an illegal instruction; expected a TORCH_EXTENSIONS_DIR for each kind "
            "of machine, or none"
        )
