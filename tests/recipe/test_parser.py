"""Mistakes on the command line and in files: one line that names the key and what was expected."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import get_type_hints

import pytest

from qwen_ds.errors import UserError
from qwen_ds.recipe.loading import load_recipe
from qwen_ds.recipe.options import Recipe
from qwen_ds.recipe.parser import expected as in_words
from qwen_ds.recipe.parser import parse_options
from qwen_ds.recipe.recipe_file import read_recipe


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lora.rr", "4"], "lora.rr; the nearest is lora.r"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--lora.variant", "qlora"], "lora.variant"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--log.every_steps", "0"], "log.every_steps is 0; expected a positive whole number"),
        (["--lora.dropout", "2"], "lora.dropout is 2"),
        (["--data.train", "a", "--data.train", "b"], "train was given twice; expected all of its"),
        (["--data.train=[a]", "--data.train", "b"], "--data.train was given twice"),
        (["--optim.betas", "0.9", "1"], "optim.betas"),
        (["--save.keep", "-1"], "save.keep is -1"),
    ],
)
def test_a_mistake_names_the_key(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        load_recipe(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "key"), [("optm: {lr: 1}", "optm.lr"), ("optim: {lrr: 1}", "optim.lrr")]
)
def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path: Path, text: str, key: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"unknown option {key}; the nearest is optim.lr"):
        load_recipe(["--config", str(file)])


def test_every_option_says_in_words_what_it_takes() -> None:
    """No message shows a Python type."""
    for section in get_type_hints(Recipe).values():
        kinds = get_type_hints(section) if dataclasses.is_dataclass(section) else {"": section}
        for kind in kinds.values():
            assert not any(sign in in_words(kind) for sign in ("<", "typing", "[", "class"))


@dataclasses.dataclass(frozen=True)
class _Options:
    """Options of a command."""

    name: str
    """A name."""
    count: int = 3
    """A number."""


def test_options_of_a_command_are_one_dataclass(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("name: a\ncount: 4\n")
    found = parse_options(_Options, "", ["--config", str(tmp_path / "o.yaml"), "--count", "5"])
    assert found == _Options("a", 5)
    with pytest.raises(UserError, match="count is many; expected a whole number"):
        parse_options(_Options, "", ["--name", "a", "--count", "many"])


def test_a_file_cannot_name_anything_but_options(tmp_path: Path) -> None:
    """tests/adversarial/test_recipes.py has the many ways to try it."""
    (tmp_path / "r.yaml").write_text("a.b: 1\nc: {d: 2}\n")
    read_recipe(str(tmp_path / "r.yaml"), ["a.b", "c.d"])
    for known in (["c.d"], ["a.b"]):
        with pytest.raises(UserError, match="unknown option"):
            read_recipe(str(tmp_path / "r.yaml"), known)


def test_a_path_is_spelled_out_wherever_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "r.yaml").write_text("output_dir: ~/a\ndata: {train: [~/b, c], system: ~/d}\n")
    found = load_recipe(["--config", str(tmp_path / "r.yaml"), "--lora.init_from", "~/e"]).recipe
    assert (found.output_dir, found.lora.init_from) == ("/home/me/a", "/home/me/e")
    assert found.data.train == ["/home/me/b", "c"] and found.data.system == "~/d"
    (tmp_path / "r.yaml").write_text("output_dir: 2024")
    with pytest.raises(UserError, match="output_dir is 2024; expected a path"):
        load_recipe(["--config", str(tmp_path / "r.yaml")])


def test_a_pipe_is_no_recipe_for_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"seed: 5")
    os.close(writer)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="a pipe, which only one of several ranks could read"):
            load_recipe(["--config", f"/dev/fd/{reader}"])
    assert load_recipe(["--config", f"/dev/fd/{reader}"]).recipe.seed == 5
    os.close(reader)


def test_texts_of_a_list_stay_texts() -> None:
    """YAML readers differ on whether 1e5 is a number."""
    texts = ["1e5", "null", "a: b", "0x1", "- c"]
    assert load_recipe(["--data.train", *texts, "--model.path", "m"]).recipe.data.train == texts
