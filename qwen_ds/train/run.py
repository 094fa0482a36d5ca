"""A training process: signals, the group of ranks, the watchdog, and how it all ends."""

from __future__ import annotations

import logging
import os
import time
import traceback
from contextlib import suppress
from typing import NoReturn

from qwen_ds import dist, signals
from qwen_ds.errors import OutOfMemory, UserError
from qwen_ds.machine import choose_device, let_segments_grow
from qwen_ds.recipe.loading import LoadedRecipe
from qwen_ds.runlog import failure_code, in_one_line
from qwen_ds.terminal import one_line, show
from qwen_ds.train.engine import start
from qwen_ds.train.job import run_in_group
from qwen_ds.train.survive.watchdog import Watchdog

log = logging.getLogger(__name__)


def run(asked: LoadedRecipe, note: str = "") -> int:
    """Train as the recipe says, with `note` as the first line; returns the exit code.

    Raises UserError if data, model or folder is wrong, or the loss is not finite.
    """
    launched = dist.has_rendezvous() or dist.world_size() > 1
    timeout_minutes = asked.recipe.distributed.timeout_minutes
    if asked.recipe.device != "cpu":
        let_segments_grow()
    device = choose_device(asked.recipe.device)
    # A minute more than the watchdog's patience: it knows more about what happened than a
    # collective does.
    start.start_process_group(device, timeout_minutes + 1)
    watchdog = Watchdog(timeout_minutes, launched=launched)
    watchdog.start()
    try:
        code = run_in_group(asked, device, watchdog, note)
    except UserError as error:  # reached by every rank, or told to the others
        watchdog.tell(error)
        watchdog.stop()
        start.stop_process_group()
        raise
    except signals.Stopped as stopped:  # before the first step; the other ranks may not know yet
        watchdog.pass_on(stopped.number)
        raise
    except Exception as error:
        if signals.ending() is None:
            end_at_once(error, watchdog)
        raise  # a peer has left at the signal that has reached this rank, too
    watchdog.stop()
    start.stop_process_group()
    return code


def end_at_once(error: Exception, watchdog: Watchdog) -> NoReturn:
    """Say what happened and leave without another word to the peers: any of them may be dead."""
    if logging.getLogger().handlers:  # before the log file is open it would go to the terminal
        log.exception("the run has failed")
    told, prefix = watchdog.blame(error) or in_one_line(error), ""
    if isinstance(error, OutOfMemory):
        # Most ranks run out of memory together. Rank 0 speaks at once, and a launcher then ends the
        # others within these two seconds; without one they speak, too.
        with suppress(RuntimeError):  # the store is on a rank that has left
            watchdog.stop(0.0)
        if dist.rank():
            time.sleep(2)
            prefix = f"[rank {dist.rank()}] "
    if told:
        show(f"{prefix}error: {one_line(told)}", err=True)
    else:
        show(traceback.format_exc(), err=True, end="")
    os._exit(failure_code(error))
