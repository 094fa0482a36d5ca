"""Recipes from files and the command line, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qwen_ds.errors import UserError
from qwen_ds.recipe.loading import check_values, load_recipe, write_recipe
from qwen_ds.recipe.options import OptimOptions, Recipe


def test_the_command_line_wins_over_the_file_and_lists_take_several_values(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("optim: {lr: 1e-4, betas: [0.9, 0.95]}\nlora: {r: 64}\n")
    options = ["--lora.r", "4", "--data.train", "a b.json", "c", "--local_rank=1"]
    loaded = load_recipe(["--config", str(file), *options])
    assert loaded.recipe.optim.lr == 1e-4 and loaded.recipe.optim.betas == (0.9, 0.95)
    assert loaded.recipe.lora.r == 4 and loaded.recipe.data.train == ["a b.json", "c"]
    assert loaded.set_keys == {"optim.lr", "optim.betas", "lora.r", "data.train"}


def test_a_written_recipe_reads_back_the_same(tmp_path: Path) -> None:
    options = ["--data.train", "数据.jsonl", "--lora.targets", "w1", "--data.weights", "[0.5]"]
    recipe = load_recipe(options).recipe
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert "数据" in (tmp_path / "recipe.yaml").read_text()
    assert load_recipe(["--config", str(tmp_path / "recipe.yaml")]).recipe == recipe
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["weights"] == [0.5]


def test_a_recipe_that_is_not_utf8_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes("data: {system: 你好}".encode("gb18030"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(["--config", str(tmp_path / "recipe.yaml")])


def test_numbers_are_written_plain(tmp_path: Path) -> None:
    """A restricted number is a class of its own, for which YAML has no word."""
    recipe = load_recipe(["--lora.r", "4", "--optim.betas", "0.8", "0.9", "--dry_run"]).recipe
    assert type(recipe.lora.r) is not int
    write_recipe(recipe, tmp_path / "r")
    stored = yaml.safe_load((tmp_path / "r").read_text())
    assert type(stored["lora"]["r"]) is int and stored["optim"]["betas"] == [0.8, 0.9]
    assert stored["dry_run"] is True and stored["method"] == "lora"


def test_values_that_were_never_parsed_are_held_to_the_same_ranges() -> None:
    check_values(Recipe())
    with pytest.raises(UserError, match="optim.lr is -1.0; expected 0 or a positive number"):
        check_values(replace(Recipe(), optim=OptimOptions(lr=-1.0)))


def test_profiled_steps_are_in_order() -> None:
    with pytest.raises(UserError, match=r"log.profile_steps is \[3, 1\]; expected two steps"):
        load_recipe(["--log.profile_steps", "[3,1]"])


@pytest.mark.parametrize(
    ("text", "train"),
    [
        ("optim:\n  # lr: 1\ndata: {train: a.jsonl}", ["a.jsonl"]),
        ("data: {train: &a [x, y], eval: *a}\noptim: {lr: 3e-4}", ["x", "y"]),
        ("data.train: 'a b'\nlora:", ["a b"]),
    ],
)
def test_a_recipe_may_leave_a_section_empty_and_name_one_file(
    text: str, train: list[str], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    loaded = load_recipe(["--config", str(tmp_path / "r.yaml")])
    assert loaded.recipe.data.train == train and loaded.recipe.lora == Recipe().lora
    assert loaded.recipe.optim.lr == (3e-4 if "3e-4" in text else Recipe().optim.lr)
    assert "lora" not in loaded.set_keys and "optim" not in loaded.set_keys
