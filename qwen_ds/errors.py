"""The error that a user can mend, and the exit codes of every command."""

from __future__ import annotations

EXIT_DONE, EXIT_FAILURE, EXIT_USER, EXIT_STOPPED = 0, 1, 2, 3


class UserError(ValueError):
    """The user's input is wrong. The message is one line: what came, what was expected, where."""


class Failed(RuntimeError):
    """Something outside of this process failed. The message is one line, the exit code 1."""


class OutOfMemory(Failed):
    """The run needs more memory than there is. The message is one line that says which setting
    fits, and the exit code 2: the settings are the user's."""
