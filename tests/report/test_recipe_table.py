"""Recipes as tables of what differs."""

from __future__ import annotations

import json

from qwen_ds.recipe.loading import to_dict
from qwen_ds.recipe.options import Recipe
from qwen_ds.report.recipe_table import between, from_defaults, spelled


def test_only_what_differs_from_the_defaults_is_listed() -> None:
    recipe = json.loads(json.dumps(to_dict(Recipe())))
    assert from_defaults(recipe) == []
    recipe["optim"]["lr"], recipe["lora"]["targets"] = 1e-4, ["w1", "w2"]
    recipe["output_dir"], recipe["optim"]["gone"] = "runs/x", None
    assert [(key, values) for key, values in from_defaults(recipe)] == [
        ("lora.targets", ("w1, w2", "c_attn, c_proj")),
        ("optim.lr", ("0.0001", "0.0003")),
        ("optim.gone", ("unset", "–")),
    ]


def test_keys_that_differ_between_runs_are_listed_in_the_order_of_the_recipe() -> None:
    one = {"output_dir": "a", "seed": 1, "optim": {"lr": 3e-4, "betas": [0.9, 0.99]}, "old": 1}
    other = {"output_dir": "b", "seed": 1, "optim": {"lr": 1e-4, "betas": [0.9, 0.99]}}
    assert [tuple(each) for each in between([one, other, one])] == [
        ("optim.lr", ("0.0003", "0.0001", "0.0003")),
        ("old", ("1", "–", "1")),
    ]


def test_values_are_spelled_as_a_recipe_has_them() -> None:
    values = (None, True, "", [], [1, None], {"a": "茶"}, 1e-8)
    assert [spelled(value) for value in values] == [
        "unset", "true", '""', "none", "1, unset", '{"a": "茶"}', "1e-08",
    ]  # fmt: skip
