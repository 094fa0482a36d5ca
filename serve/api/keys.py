"""Keys of clients, from options and a file."""

from __future__ import annotations

from pathlib import Path

from qwen_ds.disk.read import read_text
from qwen_ds.errors import UserError
from qwen_ds.runlog import say
from serve.api.options import ApiOptions
from serve.api.origins import is_loopback

_KEY_FILE_BYTES = 1 << 20


def read_keys(options: ApiOptions) -> list[str]:
    """The keys of clients. UserError: a file that holds none, or lines that are no keys."""
    keys = list(options.api_key)
    for key in keys:
        _require_key(key, "--api_key")
    if options.api_key_file is not None:
        file = Path(options.api_key_file)
        found = _keys_of(file)
        if not found:
            raise UserError(f"{file}: holds no key; expected one on each line")
        if file.stat().st_mode & 0o077:
            say(f"{file}: other users can read the keys; chmod 600 would keep them out")
        keys += found
    if not keys and not is_loopback(options.host):
        say(f"--host {options.host} without --api_key_file: whoever reaches it can use it")
    return keys


def _keys_of(file: Path) -> list[str]:
    # Some editors begin a file with a byte order mark.
    text = read_text(file, _KEY_FILE_BYTES).removeprefix("\ufeff")
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        key = line.strip()
        if key and not key.startswith("#"):
            _require_key(key, f"{file}:{number}")
            found.append(key)
    return found


def _require_key(key: str, place: str) -> None:
    """UserError: it cannot stand in a header. The key itself is not said."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        came = "a key is empty, or has blanks or other than printable ASCII characters"
        raise UserError(f"{place}: {came}; expected none of that")
