"""Checks of a place to write in, made before any work is done for it."""

from __future__ import annotations

import os
from pathlib import Path

from qwen_ds.errors import UserError


def require_folder(folder: Path, make: bool = False) -> None:
    """Check that `folder` is, or may be made, a folder to write in, else raise UserError.

    With `make` it is also made.
    """
    # Not Path.exists, which raises where it may not look.
    above = next((path for path in (folder, *folder.parents) if os.path.exists(path)), folder)
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
    """Make the folders above `output`, and raise UserError if no folder can be renamed to it."""
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
