"""Recipes: files, command line, and mistakes that are answered in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qwen_ds.errors import UserError
from qwen_ds.recipe.loading import load_recipe, write_recipe
from qwen_ds.recipe.options import Recipe
from qwen_ds.runlog import run_command


def test_defaults_are_the_original_projects() -> None:
    recipe = load_recipe([]).recipe
    assert recipe == Recipe()
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (8, 16, 0.05)
    assert recipe.lora.targets == ["c_attn", "c_proj"]
    assert (recipe.optim.lr, recipe.optim.schedule, recipe.optim.epochs) == (3e-4, "constant", 3.0)
    assert (recipe.batch.rows_per_step, recipe.save.every_steps, recipe.save.keep) == (128, 382, 32)
    assert (recipe.data.max_prompt_tokens, recipe.data.max_answer_tokens) == (254, 254)


def test_the_command_line_wins_over_the_file_and_lists_take_several_values(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("optim: {lr: 1e-4, betas: [0.9, 0.95]}\nlora: {r: 64}\n")
    loaded = load_recipe(
        ["--config", str(file), "--lora.r", "4", "--data.train", "a b.json", "c", "--local_rank=1"]
    )
    assert loaded.recipe.optim.lr == 1e-4 and loaded.recipe.optim.betas == (0.9, 0.95)
    assert loaded.recipe.lora.r == 4 and loaded.recipe.data.train == ["a b.json", "c"]
    assert loaded.set_keys == {"optim.lr", "optim.betas", "lora.r", "data.train"}


def test_a_written_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(
        ["--data.train", "数据.jsonl", "--lora.targets", "w1", "--data.weights", "[0.5]"]
    ).recipe
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert "数据" in (tmp_path / "recipe.yaml").read_text()
    assert load_recipe(["--config", str(tmp_path / "recipe.yaml")]).recipe == recipe
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["weights"] == [0.5]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lora.rr", "4"], "lora.rr; the nearest is lora.r"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--lora.variant", "qlora"], "lora.variant"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--log.every_steps", "0"], "log.every_steps is 0; expected a positive number"),
        (["--lora.dropout", "2"], "lora.dropout is 2"),
        (
            ["--data.train", "a", "--data.train", "b"],
            "--data.train was given twice; expected all of its values after",
        ),
        (["--data.train=[a]", "--data.train", "b"], "--data.train was given twice"),
        (["--optim.betas", "0.9", "1"], "optim.betas"),
        (["--save.keep", "-1"], "save.keep is -1"),
    ],
)
def test_a_mistake_names_the_key(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        load_recipe(arguments)
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_not_utf8_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes("data: {system: 你好}".encode("gb18030"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(["--config", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize(
    ("text", "key"), [("optm: {lr: 1}", "optm.lr"), ("optim: {lrr: 1}", "optim.lrr")]
)
def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path: Path, text: str, key: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"unknown option {key}; the nearest is optim.lr"):
        load_recipe(["--config", str(file)])


@pytest.mark.parametrize(
    ("ended", "code", "line"),
    [
        (UserError("no rows"), 2, "error: no rows\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, 0, ""),
    ],
)
def test_exit_codes(
    ended: BaseException | None,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def main() -> int:
        if ended is not None:
            raise ended
        return 0

    with pytest.raises(SystemExit) as left:
        run_command(main)
    assert left.value.code == code and capsys.readouterr().err == line
