"""A bound on the size of YAML before it is loaded: aliases of aliases make a few lines endless."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import yaml

from qwen_ds.errors import UserError

_LARGEST_FILE = 1 << 20
_MOST_VALUES = 100_000
_CONFIG = "--config"


def check_yaml(args: Sequence[str]) -> None:
    """Raise UserError for an option's value, or a file of --config, that is larger than any recipe,
    aliases counted as often as they stand, or that is no regular file."""
    for at, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name == _CONFIG:
            value = value or "".join(args[at + 1 : at + 2])
            _check_text(_text_of(Path(value)), value)
        elif "&" in arg and "*" in arg:
            _check_text(value or arg, name if value else "a value")


def _text_of(path: Path) -> str:
    """The text of a recipe file; nothing if it cannot be read, which the parser words."""
    try:
        about = path.stat()
        if stat.S_ISDIR(about.st_mode):
            return ""
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path}: a device or a pipe; expected a recipe file")
        if about.st_size > _LARGEST_FILE:
            raise UserError(f"{path}: {about.st_size:,} bytes; expected at most {_LARGEST_FILE:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _check_text(text: str, name: str) -> None:
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        size = 0 if root is None else _size(root, {})
    except yaml.YAMLError:
        return  # the parser words it
    except RecursionError:
        raise UserError(f"{name}: nested too deep; expected sections and keys") from None
    if size > _MOST_VALUES:
        raise UserError(
            f"{name}: its aliases unfold to more than {_MOST_VALUES:,} values; expected fewer"
        )


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """The number of values below a node. One inside itself is as large as can be."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = _MOST_VALUES + 1
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = list(node.value)
    elif isinstance(node, yaml.MappingNode):
        inner = [each for pair in node.value for each in pair]
    sizes[id(node)] = 1 + sum(_size(each, sizes) for each in inner)
    return sizes[id(node)]
