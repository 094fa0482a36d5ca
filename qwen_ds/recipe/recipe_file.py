"""Recipe files, looked at before jsonargparse reads them: YAML that can only be data.

jsonargparse imports the module of a `class_path`, or of a dotted name in place of a section. So a
file passes only with names of options and mappings around them. Aliases that make a small file
huge, and keys that come twice are refused too.
"""

from __future__ import annotations

import difflib
import os
import select
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qwen_ds import dist
from qwen_ds.errors import UserError

MAX_BYTES = 2**20
PIPE_SECONDS = 10.0  # of silence
MAX_DEPTH = 16
MAX_VALUES = 10_000  # in a file with aliases, once they are written out


class _Loader(yaml.SafeLoader):
    """SafeLoader, which makes no Python objects, without repeated keys."""

    depth = 0
    has_alias = False

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.has_alias = True
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


def read_recipe(path: str, known: Collection[str], lists: Collection[str] = ()) -> str:
    """Check a recipe file against the dotted names of all options, and give it as YAML in which
    sections with nothing in them are left out, and one text for an option in `lists` is a list.
    UserError: neither a regular file nor a pipe, too large, not UTF-8, not a mapping, or a key that
    is no option.
    """
    try:
        raw = _bytes_of(path)
    except OSError as error:
        raise UserError(f"--config: {path}: {error.strerror}; expected a recipe in YAML") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: over {MAX_BYTES:,} bytes; expected a recipe in YAML")
    try:
        loader = _Loader(raw.decode("utf-8-sig"))
        node = loader.get_single_node()
        if loader.has_alias:
            _check_size(node)
        content = None if node is None else loader.construct_document(node)
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path}: the recipe file is not UTF-8 ({place})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {_in_words(error)}; expected a recipe in YAML") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: {_kind(content)}; expected a mapping of options")
    _check_names(content, known, "", path)
    _complete(node, known, lists, "")
    return yaml.serialize(node)


def _bytes_of(path: str) -> bytes:
    """The content of a recipe file, cut where it is too large."""
    file = Path(path)
    try:
        came = "not a regular file" if file.exists() else "no such file"
        is_file, is_pipe = file.is_file(), file.is_fifo()
    except (OSError, ValueError):  # too long a name, a zero in it
        came, is_file, is_pipe = "no such file", False, False
    if is_pipe and dist.world_size() > 1:
        came, is_pipe = "a pipe, which only one of several ranks could read", False
    elif came == "no such file" and path.startswith(("/dev/fd/", "/proc/self/fd/")):
        came = "no such file (a launcher passes no pipe on to its ranks)"
    if is_pipe:
        about = file.stat()
        return _bytes_of_pipe(path, about.st_dev, about.st_ino)
    if not is_file:
        raise UserError(f"--config: {came}: {path[:200]}; expected a recipe in YAML")
    with file.open("rb") as stream:
        return stream.read(MAX_BYTES + 1)


@cache
def _bytes_of_pipe(path: str, device: int, inode: int) -> bytes:
    """The content of a pipe, which can be read only once: a parser asks for it several times, each
    time with the same `device` and `inode`."""
    raw = b""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        while len(raw) <= MAX_BYTES:
            if not select.select([descriptor], [], [], PIPE_SECONDS)[0]:
                raise UserError(
                    f"--config: {path}: nothing came through the pipe for {PIPE_SECONDS:g} s;"
                    " expected a recipe in YAML"
                )
            block = os.read(descriptor, 2**16)
            if not block:
                break
            raw += block
    finally:
        os.close(descriptor)
    return raw


def _check_size(root: Any) -> None:
    """Raise where a file is too large or too deep with its aliases written out."""
    rest, count = [(root, 1)], 0
    while rest:
        node, depth = rest.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            why = "nested too deeply" if depth > MAX_DEPTH else f"over {MAX_VALUES:,} values"
            raise yaml.MarkedYAMLError(None, None, f"by its aliases {why}", node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            rest += [(inner, depth + 1) for inner in node.value]
        elif isinstance(node, yaml.MappingNode):
            rest += [(inner, depth + 1) for _, inner in node.value]


def _complete(section: Any, known: Collection[str], lists: Collection[str], prefix: str) -> None:
    kept = []
    for key, value in section.value:
        name = prefix + key.value
        if name not in known and isinstance(value, yaml.ScalarNode):
            continue  # a section with nothing in it
        if name not in known:
            _complete(value, known, lists, f"{name}.")
        elif name in lists and value.tag == "tag:yaml.org,2002:str":
            value = yaml.SequenceNode("tag:yaml.org,2002:seq", [value])
        kept.append((key, value))
    section.value = kept


def _check_names(content: dict[Any, Any], known: Collection[str], prefix: str, path: str) -> None:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in known:
            continue
        inside = [each for each in known if each.startswith(f"{name}.")]
        if not inside or not isinstance(key, str) or "." in key:
            unknown = f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else name
            raise UserError(f"{path}: {unknown_option(unknown, known)}")
        if value is None:
            continue
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
