"""Recipes that unfold without end are refused before they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.recipe.loading import load_recipe

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "aliases unfold to more than 100,000 values"),
        ("data: &d {train: [*d]}\n", "aliases unfold"),
        ("seed: " + "[" * 5000, "nested too deep"),
        ("#" * (1 << 21), "2,097,152 bytes; expected at most 1,048,576"),
    ],
)
def test_a_recipe_has_a_size(text: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    for args in (["--config", str(recipe)], [f"--config={recipe}"]):
        with pytest.raises(UserError, match=message):
            load_recipe(args)


def test_an_option_has_a_size_too() -> None:
    value = "{" + LAUGHS.strip().replace("\n", ", ") + "}"
    for args in (["--data.columns", value], [f"--data.columns={value}"]):
        with pytest.raises(UserError, match="aliases unfold"):
            load_recipe(args)


def test_a_device_is_no_recipe() -> None:
    with pytest.raises(UserError, match="/dev/zero: a device"):
        load_recipe(["--config", "/dev/zero"])


def test_an_alias_is_allowed(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data:\n  train: &files [a.json]\n  eval: *files\n")
    loaded = load_recipe(["--config", str(recipe)]).recipe
    assert loaded.data.eval == loaded.data.train == ["a.json"]
