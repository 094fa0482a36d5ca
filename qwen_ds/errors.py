"""The user's mistakes, and how a command ends: one line on stderr and an exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

EXIT_DONE, EXIT_FAILURE, EXIT_USER, EXIT_STOPPED = 0, 1, 2, 3


class UserError(ValueError):
    """The user's input is wrong. The message is one line: what came, what was expected, where."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run an entry point and leave the process with its exit code.

    UserError becomes one line on stderr and exit code 2. Anything else is ours: the traceback shows, exit code 1.
    """
    try:
        code = main()
    except UserError as error:
        _say_once(f"error: {error}")
        code = EXIT_USER
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code or EXIT_DONE)


def _say_once(line: str) -> None:
    """One line, also when every rank of a machine found the same mistake: the others speak only if nobody ended the
    run for them within two seconds (the launcher stops all ranks as soon as it sees the first exit code)."""
    from qwen_ds import dist  # not at the top: it imports this module

    if dist.local_rank():
        time.sleep(2)
        line = f"[local rank {dist.local_rank()}] {line}"
    print(line, file=sys.stderr, flush=True)
