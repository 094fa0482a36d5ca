"""Files and folders that are complete or absent, whenever the process or the machine dies.

Everything is written under a hidden name beside its place, `.NAME.unfinished`. Its bytes are
brought to the disk, it gets its name in one rename, and the folder that holds the name is brought
to the disk too: a result that is seen under its name survives a power cut. Files have mode 0644,
since a server may run under another user.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unfinished_name(path: Path, owner: str = "") -> Path:
    """The hidden name under which `path` is put together.

    `owner` tells apart processes that may build the same thing at once, for example by process id.
    Of folders the first rename wins, of files the last.
    """
    return path.with_name(f".{path.name}{'.' if owner else ''}{owner}.unfinished")


def sync(path: Path) -> None:
    """Wait until the disk has a file's bytes, or a folder's names.

    Without it a power cut may undo a rename, or leave a renamed file empty.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the disk's errors in the block the name of the file, which a write does not know."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path, owner: str = "") -> Iterator[Path]:
    """Yield a hidden file name to write to; the file takes the place of `path` when the block ends.

    After an error in the block the hidden file is removed and `path` is what it was. `owner` is
    that of `unfinished_name`.
    """
    unfinished = unfinished_name(path, owner)
    try:
        with naming(path):
            yield unfinished
        unfinished.chmod(0o644)
        sync(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> str:
    """Write `text` as UTF-8, complete or absent; returns its sha256 in hex."""
    raw = text.encode(errors="backslashreplace")  # a lone surrogate, in JSON: its own escape
    with replacing(path) as unfinished:
        unfinished.write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def write_json(path: Path, value: object) -> str:
    """Write `value` as indented JSON, complete or absent; returns the file's sha256 in hex."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def publish(folder: Path, target: Path, *, replace: bool = False) -> None:
    """Give the finished `folder` the name `target`, once the disk has all of it.

    With `replace` a folder that has the name already is set aside first and removed last. Without
    it only an empty folder gives way, and a name that is taken is an OSError.
    """
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:  # the deeper, the earlier
        sync(path)
    aside = target.with_name(f".{target.name}.replaced")
    if replace and target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    folder.rename(target)
    sync(target.parent)
    if replace:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that half of it is never seen under its name."""
    hidden = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)
