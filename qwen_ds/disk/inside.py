"""The files of a folder that may be copied out of it: those that are its own."""

from __future__ import annotations

from pathlib import Path

from qwen_ds.disk.read import read_bytes
from qwen_ds.errors import UserError


def read_own(folder: Path, name: str) -> bytes:
    """The bytes of a file that is the folder's own, so that a copy of it shows nobody more than
    the folder did.

    A symbolic link may stay in the folder, lead into the blobs of the hub cache that the folder is
    part of (models--X/snapshots/Y -> models--X/blobs), or to the very folder that its config.json
    links to: then this one was linked together from that. UserError: it leads elsewhere, is no
    regular file, cannot be read, or is too large for a small file.
    """
    path = folder / name
    try:
        home, real = folder.resolve(strict=True), path.resolve(strict=True)
    # A loop of links is a RuntimeError up to Python 3.12.
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a loop of symbolic links"
        raise UserError(f"{path}: {reason}; expected a file that can be copied") from None
    roots = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        roots.append((home.parent.parent / "blobs").resolve())
    is_beside_config = real.parent == (folder / "config.json").resolve().parent
    if not is_beside_config and not any(real.is_relative_to(root) for root in roots):
        raise UserError(
            f"{path}: a link that leaves the folder, to {real}; expected a file of its own, since"
            " it is copied to the output"
        )
    return read_bytes(real, expected=f"a file that can be copied as {name}")
