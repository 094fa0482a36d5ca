"""Real paths in place of `demo` and of relative ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.plan.sources import find_sources
from qwen_ds.recipe.loading import load_recipe


def test_the_demo_brings_its_model_and_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked, model = find_sources(load_recipe([]))
    assert model.path == Path(asked.recipe.model.path) and model.weights is not None
    assert Path(asked.recipe.model.path).is_relative_to(tmp_path.resolve())
    assert [Path(name).name for name in asked.recipe.data.train] == ["train.jsonl"]
    assert [Path(name).name for name in asked.recipe.data.eval] == ["eval.jsonl"]


def test_a_path_becomes_absolute_and_the_rest_stays(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_dir.parent)
    asked = load_recipe(["--model.path", small_dir.name, "--lora.r", "4"])
    found, _ = find_sources(asked)
    assert found.recipe.model.path == str(small_dir.resolve())
    assert found.recipe.lora == asked.recipe.lora and found.set_keys == asked.set_keys


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_sources(load_recipe(["--model.path", str(tmp_path / "absent")]))
