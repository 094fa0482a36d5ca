"""The parser of every command line: jsonargparse with this project's conventions."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import jsonargparse
import yaml

from qwen_ds.disk.place import given_path
from qwen_ds.errors import UserError
from qwen_ds.recipe.ranges import IN_WORDS, PathText
from qwen_ds.recipe.recipe_file import read_recipe, unknown_option

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

Options = TypeVar("Options")
# The ways in which jsonargparse's messages name an option that there is not, ...
_UNKNOWN = (
    re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'"),
    re.compile(r"Option '([\w.]+)' is not accepted"),
    re.compile(r"unrecognized arguments.*?--([\w.]+)"),
)
# ... and in which they name the key and repeat the value.
_KEY = re.compile(r'Parser key "([\w.]+)"')
_VALUES = (
    re.compile(r"(?:Given value|Got value): (.+)$"),
    re.compile(r"Not of type \w+: (\S+) (?:does not conform|not an? )"),
    re.compile(r"(?:invalid literal|could not convert) .*: (.*)$"),
)


class Parser(jsonargparse.ArgumentParser):
    """A parser that reports a mistake as a UserError of one line that names the key.

    Each takes options from a file, too (`--config`). `--key A B C` fills a list option, and
    `--local_rank`, which DeepSpeed's launcher adds, is accepted.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(exit_on_error=False, **kwargs)
        self.add_argument("--config", action="config", help="options as a YAML file")
        self.add_argument("--local_rank", "--local-rank", type=int, help=jsonargparse.SUPPRESS)

    def parse_path(self, cfg_path: Any, **kwargs: Any) -> jsonargparse.Namespace:
        """Read the options in a recipe file; jsonargparse calls it for `--config`."""
        lists = [action.dest for action in self._actions if _is_of_texts(_kind(action))]
        return self.parse_string(read_recipe(str(cfg_path), self._keys(), lists), **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(self._explain(message)) from None

    def parse(
        self, argv: Sequence[str] | None = None, *, defaults: bool = True
    ) -> jsonargparse.Namespace:
        """Parse argv; None takes the process's own. Without `defaults` the result holds only what
        the user wrote. UserError: an unknown option, a value of the wrong type or out of its range.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        self._check_words(words)
        args = self._fold_lists(self._switch_on(words))
        try:
            parsed = self.parse_args(args, defaults=defaults)
        except argparse.ArgumentError as error:
            self.error(str(error))
        except RecursionError:
            raise UserError("an option's value is nested too deeply") from None
        for name in ("local_rank", "config"):
            parsed.pop(name, None)
        for action in self._actions:
            if _holds_paths(_kind(action)) and parsed.get(action.dest) is not None:
                parsed[action.dest] = _given(action.dest, parsed[action.dest])
        return parsed

    def _explain(self, message: str) -> str:
        """Turn one of jsonargparse's messages, which run over several lines, into one line."""
        text = re.sub(r"\s+", " ", message).strip()
        if unrecognised := next(filter(None, (each.search(text) for each in _UNKNOWN)), None):
            unknown = ".".join(unrecognised.groups())
            return unknown_option(unknown, self._keys())
        key = _KEY.search(text)
        kind = next((_kind(a) for a in self._actions if key and a.dest == key[1]), None)
        value = next(filter(None, (each.search(text) for each in _VALUES)), None)
        if key is not None and kind is not None and value is None and "Not of type" in text:
            return f"{key[1]} has another type; expected {expected(kind)}"
        if key is None or kind is None or value is None:
            return text
        came = value[1].split(" - Expected ")[0]
        came = came if len(came) <= 200 else f"{came[:200]}..."
        return f"{key[1]} is {came}; expected {expected(kind)}"

    def _keys(self) -> list[str]:
        """Names of the options that a file may set: no sections, and none of this class's own."""
        dests = [action.dest for action in self._actions if action.option_strings]
        inner = {dest.rpartition(".")[0] for dest in dests}
        ours = {"help", "config", "local_rank", "print_config"}
        return [dest for dest in dests if dest not in inner and dest not in ours]

    def _check_words(self, words: Sequence[str]) -> None:
        """Check recipe files and option names before jsonargparse sees them: for a section's own
        name, such as `--optim`, it would read another file or import a module."""
        keys, rest = self._keys(), iter(words)
        ours = {"help", "config", "local_rank", "local-rank", "print_config"}
        for word in rest:
            name, has_value, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or word == "--":
                continue
            if name == "config":
                read_recipe(value if has_value else next(rest, ""), keys)
            elif any(key.startswith(f"{name}.") for key in keys):
                near = next(key for key in keys if key.startswith(f"{name}."))
                raise UserError(f"--{name} is a section; expected its keys, such as --{near}")
            elif name.removesuffix("+") not in keys and name not in ours:
                raise UserError(unknown_option(name, keys))

    def _names(self, holds: Callable[[Any], bool]) -> set[str]:
        """Long option strings of the actions for which `holds` is true."""
        actions = (action for action in self._actions if holds(action))
        return {s for action in actions for s in action.option_strings if s.startswith("--")}

    def _switch_on(self, args: list[str]) -> list[str]:
        """Let a bare `--overwrite` mean `--overwrite true`, for every true-or-false option."""
        switches = self._names(lambda action: _kind(action) is bool)
        return [
            f"{arg}=true" if arg in switches and after.startswith("--") else arg
            for arg, after in itertools.zip_longest(args, args[1:], fillvalue="--")
        ]

    def _fold_lists(self, args: list[str]) -> list[str]:
        """Turn `--data.train a b` into `--data.train=["a", "b"]`, for options whose type is a list.

        Given twice, such an option would lose its first values: that is a UserError.
        """
        is_list = re.compile(r"(list|tuple)\[", re.IGNORECASE)
        lists = self._names(lambda action: bool(is_list.search(str(_kind(action)))))
        texts = self._names(lambda action: _is_of_texts(_kind(action)))
        folded: list[str] = []
        given: set[str] = set()
        rest = list(args)
        while rest:
            arg = rest.pop(0)
            name = arg.partition("=")[0]
            if name in lists and name in given:
                expected_once = f"expected all of its values after one {name}"
                raise UserError(f"{name} was given twice; {expected_once}")
            given.add(name)
            if arg in lists:
                values = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
                del rest[: len(values)]
                is_yaml = len(values) == 1 and values[0].startswith("[")
                quotes = '"' if arg in texts else None  # or 1e5 would be read as a number
                spelled = yaml.safe_dump(
                    values, default_style=quotes, default_flow_style=True, width=10**9
                ).strip()
                arg = f"{name}={values[0] if is_yaml else spelled}"
            folded.append(arg)
        return folded


def _kind(action: argparse.Action) -> Any:
    """The type of an option, which jsonargparse keeps in an attribute of its own; None without."""
    return vars(action).get("_typehint")


def _is_of_texts(kind: Any) -> bool:
    """Whether a type is a list of texts or paths, or that or nothing."""
    lists, texts = {list[str], list[PathText]}, {str, PathText}
    return kind in lists or (bool(lists & {*get_args(kind)}) and not texts & {*get_args(kind)})


def _holds_paths(kind: Any) -> bool:
    return kind is PathText or any(map(_holds_paths, get_args(kind)))


def _given(option: str, value: Any) -> Any:
    """A path or a list of paths as `given_path` has it, in plain texts."""
    if isinstance(value, list):
        return [given_path(option, str(each)) for each in value]
    return given_path(option, str(value))


def expected(kind: Any) -> str:
    """The words by which a message describes the values of a type."""
    arguments = [inner for inner in get_args(kind) if inner is not NoneType]
    if get_origin(kind) is Literal:
        return " or ".join(", ".join(map(str, arguments)).rsplit(", ", 1))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(expected(inner) for inner in arguments)
    if get_origin(kind) is list:
        return f"a list, each of it {expected(arguments[0])}"
    if get_origin(kind) is tuple:
        return f"{len(arguments)} values, each {expected(arguments[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return IN_WORDS.get(kind.__name__) or names.get(kind, "a mapping")


def parse_options(
    kind: type[Options],
    description: str,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> Options:
    """Parse a command's options into a dataclass, from argv and the YAML file of --config.
    UserError: as `Parser.parse`, or what the dataclass itself refuses."""
    parser = Parser(prog=prog, description=description)
    parser.add_class_arguments(kind)
    return kind(**parser.instantiate(parser.parse(argv)))
