"""The places of rows: files, folders, hub caches, folders of `datasets`, hub data sets.

A folder is followed through symbolic links. Whatever in it is left out (other splits, files that
are no data, a second name of the same file) is told; an entry that cannot be read is an error.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_ds.data.read.dialogue import names
from qwen_ds.data.read.file_names import (
    DATA_SUFFIXES,
    chosen_names,
    is_about_data,
    is_hidden,
    names_of_split,
)
from qwen_ds.data.read.files import read_rows, require_file
from qwen_ds.data.read.files_json import BadRow, SourceRow
from qwen_ds.data.read.files_tables import numbered_rows
from qwen_ds.data.read.limits import DEFAULT, FileOptions, LimitReached
from qwen_ds.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED_STEP = re.compile(r"(?:\A|/)cache-[0-9a-f]+[^/]*\.arrow\Z")
_ARROW_ROWS = 1024
_EXPECTED = "a data file, a folder of them, or a hub id org/name"


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one path's rows: files, a folder of `datasets`, or the hub."""

    path: str
    files: tuple[Path, ...] = ()
    saved: Path | None = None
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None  # of a hub or saved data set, or of what one file holds
    left_out: tuple[tuple[str, str], ...] = ()
    """(file, reason) of what lies in the folder and is not read."""


def locate(path: str | Path) -> Place:
    """Find the rows of a path without reading them. UserError if they are not there."""
    path = str(path)
    folder, _, split = path.partition(":")
    try:
        if Path(path).is_dir():
            return _folder(path, Path(path), None)
        if os.path.lexists(path):
            require_file(Path(path))
            return Place(path, files=(Path(path),))
        if split and Path(folder).is_dir():
            return _folder(path, Path(folder), split)
        is_file = bool(split) and Path(folder).is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
        what = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path[:200]!r}: {what}; expected {_EXPECTED}") from error
    if is_file:
        return Place(path, files=(Path(folder),), split=split)
    hub_id, *rest = path.split(":")
    is_hub_id = _HUB_ID.fullmatch(hub_id) and not hub_id.lower().endswith(DATA_SUFFIXES)
    if is_hub_id and len(rest) <= 2 and not Path(hub_id).parent.exists():
        config = rest[0] if len(rest) == 2 else None
        return Place(path, hub_id=hub_id, config=config, split=rest[-1] if rest else "train")
    raise UserError(f"{path}: no such file or folder; expected {_EXPECTED}")


def rows_of(place: Place, options: FileOptions = DEFAULT) -> Iterator[SourceRow | BadRow]:
    """The source rows of a path, file after file."""
    for left, reason in place.left_out:
        options.on_left_out(left, reason)
    options = replace(options, split=place.split)
    parts = [(f"{file}: the file", read_rows(file, options)) for file in place.files]
    if place.saved is not None or place.hub_id is not None:
        parts.append((f"{place.path}: the data set", _dataset_rows(place, options)))
    for name, rows in parts:
        is_empty = True
        for row in rows:
            is_empty = False
            yield row
        if is_empty:
            raise UserError(f"{name} holds no rows; expected at least one")


def _folder(path: str, folder: Path, split: str | None) -> Place:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Place(path, saved=folder, split=split)
    folder = _revision(folder)
    left: dict[str, str] = {}
    found = _data_files(folder, left)
    if not found:
        expected = "files such as *.json, *.parquet, *.csv"
        raise UserError(f"{path}: the folder holds no data files; expected {expected}")
    wanted, others = names_of_split(found, split, path)
    left |= others
    return Place(
        path,
        files=tuple(folder / name for name in wanted),
        left_out=tuple((str(folder / name), reason) for name, reason in sorted(left.items())),
    )


def _data_files(folder: Path, left: dict[str, str]) -> list[str]:
    """The data files below a folder, by name; why another is none goes into `left`."""
    seen = list(_walk(folder, left))
    _one_cached_data_set(folder, seen)
    steps = [name for name in seen if _CACHED_STEP.search(name)]
    others = [name for name in seen if name not in steps]
    if others:
        left |= dict.fromkeys(steps, "a step that datasets has cached")
        seen = others
    found = chosen_names(seen)
    real: dict[Path, str] = {}
    for name in list(found):
        first = real.setdefault((folder / name).resolve(), name)
        if first != name:
            found.remove(name)
            left[name] = f"the same file as {first}"
    for name in seen:
        if name not in found and name not in left and not is_about_data(name):
            left[name] = "no suffix of data"
    return found


def _walk(folder: Path, left: dict[str, str]) -> Iterator[str]:
    """The names of the regular files below a folder, links followed; each real folder once."""
    at = os.stat(folder)
    begin = (at.st_dev, at.st_ino)
    seen, todo = {begin}, [("", frozenset([begin]))]
    while todo:
        below, around = todo.pop()
        try:
            entries = sorted(entry.name for entry in os.scandir(folder / below))
        except OSError as error:
            raise UserError(
                f"{folder / below}: {error.strerror}; expected a readable folder"
            ) from error
        for entry in entries:
            name = f"{below}{entry}"
            if is_hidden(name):
                continue
            path = folder / name
            try:
                about = path.stat()
            except OSError:
                require_file(path)  # words what is wrong with it
                raise
            identity = (about.st_dev, about.st_ino)
            if not stat.S_ISDIR(about.st_mode):
                require_file(path)
                yield name
            elif identity in around:
                came = "a link to a folder that it lies in"
                raise UserError(f"{path}: {came}; expected folders without such rings")
            elif identity in seen:
                left[name] = "a second link to the same folder"
            else:
                seen.add(identity)
                todo.append((f"{name}/", around | {identity}))


def _revision(folder: Path) -> Path:
    """The folder itself or, of a hub cache, the snapshot of its current revision."""
    cache = folder.parent if folder.name == "snapshots" else folder
    snapshots = cache / "snapshots"
    if not snapshots.is_dir() or not ((cache / "refs").is_dir() or (cache / "blobs").is_dir()):
        return folder
    revisions = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    main = cache / "refs" / "main"
    current = main.read_text(errors="replace").strip() if main.is_file() else None
    if current in revisions:
        return snapshots / str(current)
    if len(revisions) == 1 and current is None:
        return snapshots / revisions[0]
    raise UserError(
        f"{cache}: a hub cache with the revisions {names(revisions) or 'none'}, of which refs/main "
        f"names {current or 'none'}; expected one of the folders in {snapshots}"
    )


def _one_cached_data_set(folder: Path, seen: list[str]) -> None:
    """Refuse a folder that holds several data sets, or versions, that `datasets` has cached."""
    about = {
        os.path.dirname(name) for name in seen if os.path.basename(name) == "dataset_info.json"
    }
    cached = sorted({os.path.dirname(n) for n in seen if n.endswith(".arrow")} & about)
    if len(cached) > 1:
        raise UserError(
            f"{folder}: several cached data sets: {names(cached)}; expected one of these folders"
        )


def _dataset_rows(place: Place, options: FileOptions) -> Iterator[SourceRow | BadRow]:
    import datasets

    try:
        if place.saved is not None:
            data = datasets.load_from_disk(str(place.saved))
        else:
            data = datasets.load_dataset(place.hub_id, place.config, split=place.split)
    # Network, hub and library raise all kinds of errors; they all mean that the path did not load.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        hub = "no such file or folder, and as a data set of the hub it"
        raise UserError(
            f"{place.path}: {'the folder' if place.saved else hub} could not be loaded ({reason}); "
            "expected a data file, a folder of data files, or the id of a data set that can be "
            "reached"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        split = place.split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
        if split not in data:
            raise UserError(f"{place.path}: no split {split!r}; splits found: {names(data)}")
        for other in data:
            if other != split:
                options.on_left_out(f"{place.saved}:{other}", f"of the split {other}")
        data = data[split]
    elif place.saved is not None and place.split is not None:
        raise UserError(
            f"{place.path}: the folder holds one data set without splits; expected {place.saved}"
        )
    try:
        batches = data.with_format("arrow").iter(batch_size=_ARROW_ROWS)
        yield from numbered_rows(batches, place.path, options)
    except LimitReached as error:
        raise UserError(str(error)) from error
