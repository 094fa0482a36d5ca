"""Recipes read from a file and the command line, and written back into a file."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwen_ds.disk.write import write_text
from qwen_ds.errors import UserError
from qwen_ds.recipe.options import Recipe
from qwen_ds.recipe.parser import Parser


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe as asked for, and the keys that the user set, in a file or on the command line."""

    recipe: Recipe
    set_keys: frozenset[str]
    added: dict[str, Any] = field(default_factory=dict)
    """Values of the options that a command has added to those of `recipe_parser`."""


def recipe_parser() -> Parser:
    """The parser of launch/train.py."""
    parser = Parser(description="Fine-tune Qwen with LoRA or fully under DeepSpeed ZeRO.")
    parser.add_class_arguments(Recipe)
    return parser


def load_recipe(argv: Sequence[str] | None = None, parser: Parser | None = None) -> LoadedRecipe:
    """Read recipe file and options into a Recipe; UserError as `Parser.parse`. `parser` is a
    `recipe_parser` to which a command has added options."""
    parser = recipe_parser() if parser is None else parser
    given = parser.parse(argv, defaults=False)
    whole = parser.parse(argv)
    keys = vars(Recipe())
    added = {key: whole.pop(key) for key in list(vars(whole)) if key not in keys}
    recipe = Recipe(**parser.instantiate(whole))
    steps = recipe.log.profile_steps
    if steps is not None and steps[0] > steps[1]:
        expected = "expected two steps, the first not after the last"
        raise UserError(f"log.profile_steps is {list(steps)}; {expected}")
    set_keys = frozenset(vars(given.as_flat())) - added.keys()
    return LoadedRecipe(recipe, set_keys, added)


def check_values(recipe: Recipe) -> None:
    """Raise UserError for a value out of its range, in a recipe that was changed after parsing."""
    try:
        recipe_parser().parse_object(_plain(recipe))
    except ArgumentError as error:
        recipe_parser().error(str(error))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested mappings, by section and key."""
    return dataclasses.asdict(recipe)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe file that reads back as this recipe, complete or absent."""
    write_text(path, yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True))


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe in types that YAML, too, can write: no tuples, no restricted numbers."""
    return json.loads(json.dumps(to_dict(recipe)))
