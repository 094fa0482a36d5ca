"""The places of a recipe's model and data: folders for `demo` and for hub ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen_ds import demo
from qwen_ds.model.folder import check_place, find_model
from qwen_ds.recipe.loading import LoadedRecipe

DEMO_HOME = Path("~/.cache/qwen_ds/demo")


def check_sources(asked: LoadedRecipe) -> None:
    """Check what can be known of the model's place before anything is fetched or made: UserError
    for a folder that is no checkpoint, and for neither a folder nor the form of a hub id."""
    if asked.recipe.model.path != "demo":
        check_place(asked.recipe.model.path, weights=False)


def find_sources(asked: LoadedRecipe, weights: bool = True) -> LoadedRecipe:
    """Put real paths into the recipe: the demo's files are made, a hub id is fetched.

    Any number of processes may call this at once. Without `weights` none are fetched or expected.
    UserError: no such model, or one that cannot be used.
    """
    recipe = asked.recipe
    place, data = recipe.model.path, recipe.data
    if place == "demo":
        paths = demo.prepare(DEMO_HOME.expanduser())
        place = str(paths.model)
        if not data.train:
            data = replace(data, train=[str(paths.train)], eval=data.eval or [str(paths.eval)])
    model = replace(recipe.model, path=str(find_model(place, weights).resolve()))
    return replace(asked, recipe=replace(recipe, model=model, data=data))
