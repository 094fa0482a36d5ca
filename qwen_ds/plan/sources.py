"""The places of a recipe's model and data: folders for `demo` and for hub ids."""

from __future__ import annotations

from dataclasses import replace

from qwen_ds import demo
from qwen_ds.disk.place import cache_home
from qwen_ds.model.carry_over import check_carried
from qwen_ds.model.folder import ModelFolder, WhichWeights, check_place, find_model
from qwen_ds.recipe.loading import LoadedRecipe


def check_sources(asked: LoadedRecipe) -> None:
    """Check what can be known of the model's place before anything is fetched or made: UserError
    for a folder that is no checkpoint, and for neither a folder nor the form of a hub id."""
    if asked.recipe.model.path != "demo":
        check_place(asked.recipe.model.path)


def find_sources(
    asked: LoadedRecipe, weights: WhichWeights = True
) -> tuple[LoadedRecipe, ModelFolder]:
    """The recipe with real paths in it, and its base inspected: the demo's files are made, a hub id
    is fetched.

    Any number of processes may call this at once. UserError: no such model, or one that cannot be
    used.
    """
    recipe = asked.recipe
    place, data = recipe.model.path, recipe.data
    if place == "demo":
        paths = demo.prepare(cache_home() / "demo")
        place = str(paths.model)
        if not data.train:
            data = replace(data, train=[str(paths.train)], eval=data.eval or [str(paths.eval)])
    found = find_model(place, weights)
    found = replace(found, path=found.path.resolve())
    if recipe.method == "full":  # its result gets copies: better refused now than at its end
        check_carried(found.path)
    model = replace(recipe.model, path=str(found.path))
    return replace(asked, recipe=replace(recipe, model=model, data=data)), found
