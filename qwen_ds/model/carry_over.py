"""The small files that travel with a model: settings, tokenizer and legal texts, but never code."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qwen_ds.disk.inside import read_own
from qwen_ds.disk.read import json_object
from qwen_ds.disk.write import replacing, write_json

_LEGAL = r"(.*[ _.-])?(licen[cs]e|notice|copying|copyright)([ _.-].*)?|use[ _-]?policy.*"
# Not the model card: it describes the base, not what was made of it.
_CARRIED = re.compile(
    r"(config|configuration|generation_config|tokenizer_config|special_tokens_map|added_tokens"
    r"|tokenizer|vocab)\.json"
    rf"|merges\.txt|.*\.tiktoken|chat_template\.(jinja|json)|{_LEGAL}",
    re.IGNORECASE,
)
# Nothing here needs a model's own code, and a folder that we wrote should run none.
_NEVER = re.compile(r".*\.(py|pyc|so|cpp|cu|bin|pt|pth|pkl|safetensors)", re.IGNORECASE)
_LEGAL_TEXT = re.compile(_LEGAL, re.IGNORECASE)
_NAMES_CODE = ("config.json", "tokenizer_config.json")  # in auto_map


def carry_over(base: Path, target: Path, legal_only: bool = False) -> list[str]:
    """Copy the small files of folder `base` to folder `target`, readable by everybody.

    They are copied verbatim, except that the settings lose `auto_map`, which names Python files
    that are not copied. Engines with their own Qwen go by model_type and architectures, which stay.
    `legal_only` is for a folder in another format, with settings and a tokenizer of its own: the
    legal texts alone. Returns the names of the files written. UserError for a file that may not be
    copied (see `read_own`), which `check_carried` finds before any work is done.
    """
    names = legal_texts(base) if legal_only else _files(base, _CARRIED)
    for name in names:
        raw = read_own(base, name)
        settings = json_object(base / name, raw) if name in _NAMES_CODE else {}
        if "auto_map" in settings:
            del settings["auto_map"]
            write_json(target / name, settings)
        else:
            with replacing(target / name) as unfinished:
                unfinished.write_bytes(raw)
    return names


def check_carried(base: Path) -> None:
    """Raise UserError if a file that travels with a model made from `base` may not be copied."""
    for name in _files(base, _CARRIED):
        read_own(base, name)


def legal_texts(folder: Path) -> list[str]:
    """Names of the files in `folder` that are licences, notices and the like."""
    return _files(folder, _LEGAL_TEXT)


def _files(folder: Path, wanted: re.Pattern[str]) -> list[str]:
    """Names that match, but for folders: whatever else has such a name is read, or refused."""
    return sorted(
        name
        for name in os.listdir(folder)
        if wanted.fullmatch(name)
        and not _NEVER.fullmatch(name)
        and not os.path.isdir(folder / name)
    )
