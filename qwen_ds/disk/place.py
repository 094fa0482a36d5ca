"""Checks of a place to write in, made before any work is done for it."""

from __future__ import annotations

import os
from pathlib import Path

from qwen_ds.errors import UserError


def require_folder(folder: Path, make: bool = False) -> None:
    """Check that `folder` is, or may be made, a folder to write in.

    Args:
        make: also make it.

    Raises:
        UserError: it cannot be written in.
    """
    above = folder
    # Not Path.exists, which raises where it may not look.
    while not os.path.exists(above) and above != above.parent:
        above = above.parent
    if not os.path.isdir(above):
        raise UserError(f"{above}: a file; expected a folder to write in")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{above}: no permission to write; expected a folder to write in")
    if make:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: {error.strerror or error}; expected a folder to write in"
            ) from error


def require_new_folder(output: Path) -> None:
    """Check that a complete folder can be renamed to `output`; makes the folders above it.

    Raises:
        UserError: it cannot.
    """
    require_folder(output.parent, make=True)
    # A rename replaces an empty folder and nothing else.
    if output.is_symlink() or os.path.ismount(output):
        what = "a symbolic link" if output.is_symlink() else "a mount point"
        raise UserError(
            f"{output}: is {what}; expected a new folder for the output (there, give a folder in"
            " it)"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; expected a new folder for the output")
