"""Paths that a user gives, and places to write in: checked before any work is done for them."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_ds.errors import UserError

MAX_PART_BYTES, MAX_PATH_BYTES = 255, 4095  # of Linux and its file systems
_VARIABLE = re.compile(r"\$(\{\w+\}|[A-Za-z_]\w*)")


def given_path(option: str, text: str) -> str:
    """A path as the user meant it, with ~ spelled out. A model's or data set's hub id passes, too.

    UserError, naming the option: a path that no file can have, that leads in a circle or where we
    may not look, an unknown ~user, or a variable, which nothing but a shell expands.
    """
    expanded = os.path.expanduser(text) if not os.path.lexists(text) else text
    if fault := _fault(text, expanded):
        came = text if len(text) <= 200 else f"{text[:200]}..."
        raise UserError(f"{option} is {came!r}: {fault}")
    return expanded


def _fault(text: str, expanded: str) -> str | None:
    if fault := name_fault(expanded):
        return fault
    if expanded.startswith("~") and not os.path.lexists(expanded):
        return "no such user's home; expected a path that is spelled out"
    if not os.path.lexists(expanded) and (variable := _VARIABLE.search(expanded)):
        return (
            f"{variable[0]} is for a shell, and nothing here expands it; expected a path that is"
            " spelled out, or the option on a command line, without single quotes"
        )
    try:
        if not os.path.isabs(expanded):
            os.getcwd()
    except FileNotFoundError:
        return "the working folder is gone; expected an absolute path, or another working folder"
    try:
        os.stat(expanded)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a loop of symbolic links; expected a path that leads somewhere"
        if error.errno in (errno.EACCES, errno.EPERM):
            return "no permission to look there; expected a path that this user may open"
    return None


def name_fault(path: str) -> str | None:
    """The reason why no file can have this path, in words; None where one can."""
    if not path:
        return "empty; expected a path"
    if "\0" in path:
        return "it has a zero byte; expected a path"
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError:
        return "it has a character that no name can have; expected a path"
    if max(map(len, raw.split(b"/"))) > MAX_PART_BYTES or len(raw) > MAX_PATH_BYTES:
        return (
            f"too long; expected at most {MAX_PART_BYTES} bytes between two slashes, and"
            f" {MAX_PATH_BYTES} in all"
        )
    return None


def cache_home() -> Path:
    """The folder for what can be made again: below XDG_CACHE_HOME, or ~/.cache; for a user without
    a home, below the folder of temporary files (TMPDIR)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the convention has others ignored
        return Path(given, "qwen_ds")
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        return Path(home, ".cache", "qwen_ds")
    folder = Path(tempfile.gettempdir(), f"qwen_ds-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder}: another user's; expected a home folder, or XDG_CACHE_HOME")
    return folder


def given_build_folder() -> Path | None:
    """The user's own folder for what torch compiles, TORCH_EXTENSIONS_DIR."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else None


@contextmanager
def building_below(folder: Path) -> Iterator[None]:
    """Have torch compile below `folder`."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["TORCH_EXTENSIONS_DIR"]


def output_file(given: str | Path) -> Path:
    """The file that the name of an output means. A symbolic link is the user's: it is followed, to
    a file that may be absent. UserError: a folder, a device, a FIFO."""
    given = Path(given)
    file = Path(os.path.realpath(given))
    if not file.name or os.path.isdir(given):
        raise UserError(f"{given}: a folder; expected the name of a file to write")
    if os.path.exists(given) and not os.path.isfile(given):
        raise UserError(f"{given}: not a regular file; expected the name of a file to write")
    return file


def refuse_input(output: Path, inputs: Iterable[Path | str]) -> None:
    """Raise UserError if the file `output` is an input, or lies in a folder that is one."""
    place = Path(os.path.realpath(output))
    for given in inputs:
        if place.is_relative_to(os.path.realpath(given)):
            raise UserError(
                f"{output}: this command reads {given}; expected an output that is no input"
            )


def require_folder(folder: Path, make: bool = False) -> None:
    """Check that `folder` is, or may be made, a folder to write in, else raise UserError.

    With `make` it is also made.
    """
    # Not Path.exists, which raises where it may not look.
    above = next((path for path in (folder, *folder.parents) if os.path.exists(path)), folder)
    link = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    if link != above:
        raise UserError(f"{link}: a link to nothing; expected a folder to write in")
    if not os.path.isdir(above):
        raise UserError(f"{above}: a file; expected a folder to write in")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{above}: no permission to write; expected a folder to write in")
    if make:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error


def unwritable(place: Path, error: OSError) -> UserError:
    """The system's error at a place to write in, for the user."""
    came = f"{error.filename or place}: {error.strerror or error}"
    return UserError(f"{came}; expected a folder to write in")


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
