"""From recipe file and command line to a checked Recipe, and back into a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwen_ds.errors import UserError
from qwen_ds.recipe.options import Recipe
from qwen_ds.recipe.parser import Parser


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe and which of its keys the user wrote, in a file or on the command line."""

    recipe: Recipe
    set_keys: frozenset[str]


def recipe_parser() -> Parser:
    parser = Parser(description="Fine-tune Qwen with LoRA or fully under DeepSpeed ZeRO.")
    parser.add_argument("--config", action="config", help="recipe file (YAML)")
    parser.add_class_arguments(Recipe)
    return parser


def load_recipe(argv: Sequence[str] | None = None) -> LoadedRecipe:
    """Read recipe file and options into a checked Recipe.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range.
    """
    return load_recipe_with(recipe_parser(), argv)[0]


def load_recipe_with(
    parser: Parser, argv: Sequence[str] | None
) -> tuple[LoadedRecipe, dict[str, Any]]:
    """`load_recipe` for a command that gave `recipe_parser` options of its own: their values come beside the recipe."""
    given = parser.parse(argv, defaults=False)
    whole = parser.parse(argv)
    whole.pop("config", None)
    keys = {field.name for field in dataclasses.fields(Recipe)}
    own = {key: whole.pop(key) for key in list(vars(whole)) if key not in keys}
    recipe = Recipe(**parser.instantiate(whole))
    check_ranges(recipe)
    set_keys = (key for key in given.as_flat().__dict__ if key != "config" and key not in own)
    return LoadedRecipe(recipe, frozenset(set_keys)), own


# What must hold of a value beyond its type.
_POSITIVE = ("a positive number", lambda x: x > 0)
_NOT_NEGATIVE = ("0 or a positive number", lambda x: x >= 0)
_SHARE = ("a number from 0 to less than 1", lambda x: 0 <= x < 1)
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "seed": _NOT_NEGATIVE,
    "model.memory_gb": _POSITIVE,
    "data.eval_fraction": _SHARE,
    "data.max_tokens": _POSITIVE,
    "lora.r": _POSITIVE,
    "lora.alpha": _POSITIVE,
    "lora.dropout": _SHARE,
    "lora.special_rows": ("auto, on or off", lambda x: x in ("auto", "on", "off", True, False)),
    "optim.lr": _NOT_NEGATIVE,
    "optim.betas": (
        "two numbers from 0 to less than 1",
        lambda x: len(x) == 2 and all(0 <= b < 1 for b in x),
    ),
    "optim.eps": _POSITIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.max_grad_norm": _NOT_NEGATIVE,
    "optim.warmup_steps": _NOT_NEGATIVE,
    "optim.epochs": _POSITIVE,
    "optim.max_steps": _POSITIVE,
    "batch.rows_per_step": _POSITIVE,
    "batch.tokens_per_micro_batch": _POSITIVE,
    "log.every_steps": _POSITIVE,
    "log.profile_steps": ("two steps, the first not after the last", lambda x: 1 <= x[0] <= x[1]),
    "eval.every_steps": _POSITIVE,
    "eval.patience": _POSITIVE,
    "eval.samples": _NOT_NEGATIVE,
    "eval.sample_tokens": _POSITIVE,
    "save.every_steps": _POSITIVE,
    "save.before_minutes": _NOT_NEGATIVE,
    "save.keep": _POSITIVE,
    "distributed.timeout_minutes": _POSITIVE,
}


def check_ranges(recipe: Recipe) -> None:
    """Raises UserError for the first value that is of the right type and still cannot be meant."""
    values = dataclasses.asdict(recipe)
    for key, (expected, holds) in _RANGES.items():
        value: Any = values
        for part in key.split("."):
            value = value[part]
        if value is not None and not holds(value):
            raise UserError(f"{key} is {value}; expected {expected}")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def write_recipe(recipe: Recipe, path: Path) -> None:
    path.write_text(
        yaml.safe_dump(_plain(to_dict(recipe)), sort_keys=False, allow_unicode=True),
        encoding="utf-8",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
