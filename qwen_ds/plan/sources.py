"""The places of a recipe's model and data: folders for `demo` and for hub ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen_ds import demo
from qwen_ds.model.folder import check_place, find_model
from qwen_ds.recipe.loading import LoadedRecipe

DEMO_HOME = Path("~/.cache/qwen_ds/demo")


def check_sources(asked: LoadedRecipe) -> None:
    """Check what can be known of the model's place before anything is fetched or made.

    Raises:
        UserError: a folder that is no checkpoint, or neither a folder nor the form of a hub id.
    """
    if asked.recipe.model.path != "demo":
        check_place(asked.recipe.model.path, weights=False)


def find_sources(asked: LoadedRecipe, weights: bool = True) -> LoadedRecipe:
    """Put real paths into the recipe: the demo's files are made, a hub id is fetched.

    Any number of processes may call this at once.

    Args:
        weights: if false, none are fetched or expected.

    Raises:
        UserError: no such model, or one that cannot be used.
    """
    recipe = asked.recipe
    if recipe.model.path == "demo":
        paths = demo.prepare(DEMO_HOME.expanduser())
        data = recipe.data
        if not data.train:
            evaluation = data.eval or [str(paths.eval)]
            data = replace(data, train=[str(paths.train)], eval=evaluation)
        recipe = replace(recipe, model=replace(recipe.model, path=str(paths.model)), data=data)
    folder = find_model(recipe.model.path, weights).resolve()
    recipe = replace(recipe, model=replace(recipe.model, path=str(folder)))
    return replace(asked, recipe=recipe)
