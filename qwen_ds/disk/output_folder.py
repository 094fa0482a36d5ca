"""An output gets its name in one step, when it is complete and on the disk."""

from __future__ import annotations

import os
from pathlib import Path

from qwen_ds.disk.weights import sync
from qwen_ds.errors import UserError
from qwen_ds.model.folder import require_folder


def require_new_folder(output: Path) -> None:
    """Raise UserError unless a complete folder can be renamed to `output`; makes the folders above it."""
    require_folder(output.parent, make=True)
    # A rename replaces an empty folder and nothing else.
    if output.is_symlink() or os.path.ismount(output):
        what = "a symbolic link" if output.is_symlink() else "a mount point"
        raise UserError(
            f"{output}: is {what}; expected a new folder for the output (there, give a folder in it)"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; expected a new folder for the output")


def publish(folder: Path, output: Path) -> None:
    """Give `folder` its name: also after a power failure it is complete or absent under it."""
    for path in sorted(folder.iterdir()):
        sync(path)
    sync(folder)
    folder.rename(output)
    sync(output.parent)
