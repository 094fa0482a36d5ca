"""The parser of every command line: jsonargparse with this project's manners."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonargparse
import yaml

from qwen_ds.errors import UserError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser with our manners: a mistake is one UserError line that names the nearest known option;
    `--key A B C` fills a list option; `--local_rank` (the launcher appends it) is accepted everywhere."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(exit_on_error=False, **kwargs)
        self.add_argument("--local_rank", "--local-rank", type=int, help=jsonargparse.SUPPRESS)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(self._explain(message))

    def parse(
        self, argv: Sequence[str] | None = None, *, defaults: bool = True
    ) -> jsonargparse.Namespace:
        """Parse argv (None: the process's own). Raises UserError."""
        args = self._fold_lists(list(sys.argv[1:] if argv is None else argv))
        try:
            parsed = self.parse_args(args, defaults=defaults)
        except argparse.ArgumentError as error:
            raise UserError(self._explain(str(error))) from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"the recipe file is not UTF-8 ({error.reason} at byte {error.start})"
            ) from None
        parsed.pop("local_rank", None)
        return parsed

    def _option_names(self) -> list[str]:
        return [s for action in self._actions for s in action.option_strings if s.startswith("--")]

    def _explain(self, message: str) -> str:
        text = re.sub(r"\s+", " ", message).strip()
        in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
        in_file = re.search(r"Option '([\w.]+)' is not accepted", text)
        flags = re.findall(r"--[\w.]+", text) if "unrecognized arguments" in text else []
        if in_group:
            unknown = ".".join(in_group.groups())
        elif in_file or flags:
            unknown = in_file.group(1) if in_file else flags[0].removeprefix("--")
        else:
            return text
        near = difflib.get_close_matches(
            unknown, [n.removeprefix("--") for n in self._option_names()], n=1, cutoff=0.4
        )
        return f"unknown option {unknown}" + (
            f"; the nearest is {near[0]}" if near else "; --help lists all"
        )

    def _fold_lists(self, args: list[str]) -> list[str]:
        """`--data.train a b` becomes `--data.train=["a", "b"]` for options whose type is a list.

        Given twice, such an option would lose its first values: that is an error.
        """
        lists = {
            s
            for action in self._actions
            if re.search(r"(list|tuple)\[", str(getattr(action, "_typehint", "")).lower())
            for s in action.option_strings
        }
        folded: list[str] = []
        given: set[str] = set()
        i = 0
        while i < len(args):
            name = args[i].partition("=")[0]
            if name in lists and name in given:
                raise UserError(
                    f"{name} was given twice; expected all of its values after one {name}"
                )
            given.add(name)
            if args[i] in lists:
                j = i + 1
                while j < len(args) and not args[j].startswith("--"):
                    j += 1
                values = args[i + 1 : j]
                inline = len(values) == 1 and values[0].startswith("[")
                folded.append(
                    f"{args[i]}={values[0] if inline else yaml.safe_dump(values, default_flow_style=True).strip()}"
                )
                i = j
            else:
                folded.append(args[i])
                i += 1
        return folded
