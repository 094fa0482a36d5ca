"""Names of files: which are data, and of which split.

An archive's members, a workbook's sheets and the keys of a JSON object that holds all rows are
named alike.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from qwen_ds.errors import UserError

_PLAIN = ".json .jsonl .jsonlines .ndjson .csv .tsv .parquet .arrow .xlsx"
DATA_SUFFIXES = tuple(f"{_PLAIN} .gz .tgz .bz2 .xz .zst .tar .zip".split())
_HIDDEN = re.compile(r"(?:\A|/)(?:__MACOSX|\.(?!\.?/)[^/]+)(?:/|\Z)")
_OF_DATASETS = ("dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json")
SPLITS = {
    word: split
    for split, words in {
        "train": "train training",
        "validation": "validation valid val dev",
        "test": "test testing eval evaluation",
    }.items()
    for word in words.split()
}
# What may follow the split in a name: "data-train-00000-of-00002-a09b74b3.parquet".
_SHARD = re.compile(r"of|\d+|[0-9a-f]{16}")


def is_hidden(name: str) -> bool:
    return _HIDDEN.search(name) is not None


def chosen_names(names: Iterable[str]) -> list[str]:
    """The data files among the names of a folder or an archive, sorted: those with a known suffix,
    or all if there are none."""
    seen = [name for name in names if not is_hidden(name)]
    data = [name for name in seen if name.lower().endswith(DATA_SUFFIXES)]
    return sorted([name for name in data if not is_about_data(name)] or seen)


def is_about_data(name: str) -> bool:
    """Whether a file belongs to the library `datasets` and holds no rows."""
    return Path(name).name in _OF_DATASETS


def split_of(name: str) -> str | None:
    """The split that a file or its folder is named for.

    The first or the last word of a name tells, before the numbers of a shard: "train.jsonl",
    "data-train-00000-of-00002.parquet", "validation/x.json", "xx_dev.json". A word in the middle
    of a longer name does not: "dialog_dev_team.jsonl".
    """
    *folders, file = name.lower().split("/")
    while file.endswith(DATA_SUFFIXES):
        file = file.rpartition(".")[0]
    for part in (file, *reversed(folders)):
        words = [word for word in re.split(r"[^a-z0-9]+", part) if word]
        while len(words) > 1 and _SHARD.fullmatch(words[-1]):
            words.pop()
        for word in (words[-1:] + words[:1]) if words else ():
            if word in SPLITS:
                return SPLITS[word]
    return None


def names_of_split(
    names: Collection[str], split: str | None, path: str
) -> tuple[list[str], dict[str, str]]:
    """(the names to read, why each of the others is not).

    Without a split these are the names of "train" and those of none, or all if there are no such
    names. With one, only its own; UserError, which names the path, if there are none.
    """
    of = {name: split_of(name) for name in names}
    if split is None:
        wanted = [name for name in names if of[name] in ("train", None)] or list(names)
    else:
        wanted = [name for name in names if split in (name, of[name])]
        if not wanted:
            known = ", ".join(splits_among(names)) or "none"
            raise UserError(f"{path}: no split {split!r} in it; splits found: {known}")
    left = {name: f"of the split {of[name] or 'train'}" for name in names if name not in wanted}
    return wanted, left


def splits_among(names: Iterable[str]) -> list[str]:
    """The splits that names are of, for a message."""
    return sorted({split for name in names if (split := split_of(name))})
