"""The place of an output: a free name, no input in it, and one merge at a time that builds it.

An output is built in the folder `<output>.partial/model`, brought to the disk and renamed. Beside
`model` lies a lock, and nothing else. That tells the leftovers of a killed merge, which the next
merge clears away, from anything else, which is refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

from qwen_ds.disk.digest import REPORT_NAME
from qwen_ds.disk.lock import holding
from qwen_ds.disk.place import require_folder, require_new_folder
from qwen_ds.disk.write import remove_folder
from qwen_ds.errors import UserError
from qwen_ds.runlog import say


def rejected_name(output: Path) -> Path:
    """The folder of an output that failed its proof."""
    return output.with_name(output.name + ".rejected")


def _partial_name(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def check_inputs_elsewhere(output: Path, inputs: Sequence[Path]) -> None:
    """Raise UserError if an input lies where the output is built, gets its name, or replaces
    another; or if the output is the root."""
    if not output.name:
        raise UserError(f"{output}: is the root; expected a new folder for the output")
    places = (output, rejected_name(output), _partial_name(output))
    for place, given in product(places, inputs):
        # Not Path.resolve, which raises for a loop of links.
        if Path(os.path.realpath(given)).is_relative_to(os.path.realpath(place)):
            raise UserError(
                f"{output}: {given} is an input, and a merge to this output writes to {place};"
                " expected another name for the output"
            )


@contextmanager
def telling_errors(output: Path, expected: str) -> Iterator[None]:
    """Turn the system's errors in the block into one line for the user: UserError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a library's, not the system's
            raise
        raise UserError(
            f"{error.filename or output.parent}: {error.strerror}; expected {expected} that takes"
            f" {output}"
        ) from error


@contextmanager
def building(output: Path) -> Iterator[Path]:
    """Yield an empty folder to build `output` in; whatever is still in it at the end is removed.

    UserError if another merge builds this output, or something else is in the way.
    """
    place = _partial_name(output)
    lock, folder = place / "merge.lock", place / "model"
    # The lock comes first and goes last: whenever a kill comes, the leftovers are known as ours.
    ours: tuple[set[Path], ...] = (set(), {lock}, {lock, folder})
    if (place.exists() or place.is_symlink()) and (
        place.is_symlink() or not place.is_dir() or set(place.iterdir()) not in ours
    ):
        raise UserError(
            f"{place}: in the way and not a killed merge's; expected to build the output there"
        )
    require_folder(place, make=True)
    try:
        with holding(lock, f"{place}: another merge is building this output, which", say):
            try:
                if folder.exists():
                    shutil.rmtree(folder)
                folder.mkdir()
                yield folder
            finally:
                if folder.exists():
                    shutil.rmtree(folder)
    finally:
        with suppress(OSError):  # another merge may be in it
            place.rmdir()


def check_names_free(output: Path) -> None:
    """Raise UserError if anything but an earlier rejected output has one of the output's names."""
    require_new_folder(output)
    rejected = rejected_name(output)
    earlier = (rejected / REPORT_NAME).is_file() and not rejected.is_symlink()
    if (rejected.exists() or rejected.is_symlink()) and not earlier:
        raise UserError(
            f"{rejected}: in the way and not an earlier merge's; expected a free name for the"
            " output"
        )


def make_room(output: Path, num_bytes: int) -> None:
    """Remove an earlier merge's rejected output; UserError unless the disk then takes this one."""
    needed, rejected = int(1.01 * num_bytes), rejected_name(output)  # headers and small files, too
    replaced = sum(path.lstat().st_size for path in rejected.rglob("*"))
    free = shutil.disk_usage(output.parent).free + replaced
    if free < needed:
        raise UserError(
            f"{output.parent}: {free / 1e9:.3g} GB ({free} bytes) free on the disk; expected"
            f" {needed / 1e9:.3g} GB ({needed} bytes) for the output"
        )
    if rejected.exists():
        remove_folder(rejected)
