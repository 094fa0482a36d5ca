"""Recipe files, looked at before jsonargparse reads them: YAML that can only be data.

jsonargparse imports the module of a `class_path`, or of a dotted name in place of a section. So a
file passes only with names of options and mappings around them. Aliases, which can make a small
file huge, and keys that come twice are refused too.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from qwen_ds.errors import UserError

MAX_BYTES = 2**20
MAX_DEPTH = 16


class _Loader(yaml.SafeLoader):
    """SafeLoader, which makes no Python objects, without aliases and without repeated keys."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, "an alias; expected values written out", mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, "nested too deeply", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value.__hash__ and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            if key.value.__hash__:
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def check_recipe(path: str, known: Collection[str]) -> None:
    """Check a recipe file against the dotted names of all options. UserError: not a regular file,
    too large, not UTF-8, not a mapping, or a key that is no option."""
    file = Path(path)
    try:
        came = None if file.is_file() else "not a regular file" if file.exists() else "no such file"
    except (OSError, ValueError):  # too long a name, a zero in it
        came = "no such file"
    if came is not None:  # a FIFO would wait for ever
        raise UserError(f"--config: {came}: {path[:200]}; expected a recipe in YAML")
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"--config: {path}: {error.strerror}; expected a recipe in YAML") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: over {MAX_BYTES:,} bytes; expected a recipe in YAML")
    try:
        content = yaml.load(raw.decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path}: the recipe file is not UTF-8 ({place})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {_in_words(error)}; expected a recipe in YAML") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: {_kind(content)}; expected a mapping of options")
    _check_names(content, known, "", path)


def _check_names(content: dict[Any, Any], known: Collection[str], prefix: str, path: str) -> None:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in known:
            continue
        inside = [each for each in known if each.startswith(f"{name}.")]
        if not inside or not isinstance(key, str) or "." in key:
            unknown = f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else name
            raise UserError(f"{path}: {unknown_option(unknown, known)}")
        if not isinstance(value, dict):
            expected = f"a mapping with keys such as {inside[0].removeprefix(prefix)}"
            raise UserError(f"{path}: {name} is {_kind(value)}; expected {expected}")
        _check_names(value, known, f"{name}.", path)


def unknown_option(name: str, known: Collection[str]) -> str:
    """The message about an option that there is not: it names the nearest."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    advice = f"the nearest is {near[0]}" if near else "--help lists all"
    return f"unknown option {name[:100]}; {advice}"


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    return f"{str(value)[:60]!r}" if isinstance(value, str | int | float) else "a list"


def _in_words(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())[:200]
