"""Recipes read from a file and the command line, and written back into a file."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
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


def recipe_parser() -> Parser:
    """The parser of launch/train.py."""
    parser = Parser(description="Fine-tune Qwen with LoRA or fully under DeepSpeed ZeRO.")
    parser.add_class_arguments(Recipe)
    return parser


def load_recipe(argv: Sequence[str] | None = None) -> LoadedRecipe:
    """Read recipe file and options into a Recipe; UserError as `Parser.parse`."""
    return load_recipe_with(recipe_parser(), argv)[0]


def load_recipe_with(
    parser: Parser, argv: Sequence[str] | None
) -> tuple[LoadedRecipe, dict[str, Any]]:
    """Load a recipe for a command that gave `recipe_parser` options of its own; the second result
    holds their values by name."""
    given = parser.parse(argv, defaults=False)
    whole = parser.parse(argv)
    keys = vars(Recipe())
    own = {key: whole.pop(key) for key in list(vars(whole)) if key not in keys}
    recipe = Recipe(**parser.instantiate(whole))
    steps = recipe.log.profile_steps
    if steps is not None and steps[0] > steps[1]:
        raise UserError(
            f"log.profile_steps is {list(steps)}; expected two steps, the first not after the last"
        )
    set_keys = (key for key in given.as_flat().__dict__ if key not in own)
    return LoadedRecipe(recipe, frozenset(set_keys)), own


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
