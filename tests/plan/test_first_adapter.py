"""lora.init_from: compared with what the recipe trains, before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_ds.errors import UserError
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.plan.first_adapter import check_first_adapter, trained_keys
from qwen_ds.plan.run import Base
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train.lora import add_lora, config_of, plain_name, write_adapter

ALL = ["c_attn", "c_proj", "w1", "w2"]


def options(**values: Any) -> LoraOptions:
    return LoraOptions(**{"r": 4, "alpha": 8, "targets": ALL, "special_rows": "off"} | values)


def written(
    model_dir: Path, folder: Path, recipe: LoraOptions, rows: list[int] | None = None
) -> dict[str, Any]:
    """A fresh adapter of this recipe (and these rows) on disk; its trained parameters by name."""
    if rows is None and recipe.special_rows == "on":
        base = Base.read(model_dir)
        rows = list(base.family.stop_ids(base.encoding))
    model = QWenLMHeadModel.from_pretrained(model_dir)
    wrapped = add_lora(model, recipe, base="", seed=0, row_ids=rows or [])
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    write_adapter(folder, config_of(wrapped), {name: p.detach() for name, p in trained.items()})
    return trained


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"variant": "dora"},
        {"targets": ["attn.c_proj"]},
        {"special_rows": "on"},
        {"modules_to_save": ["wte", "lm_head"]},
    ],
    ids=str,
)
def test_the_keys_that_are_expected_are_those_that_training_writes(
    small_dir: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    trained = written(small_dir, tmp_path / "a", options(**values))
    assert trained_keys(options(**values), Base.read(small_dir)) == set(map(plain_name, trained))
    same = options(**values, init_from=str(tmp_path / "a"))
    check_first_adapter(same, Base.read(small_dir))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"r": 8, "alpha": 16}, "has rank 4; expected 8"),
        ({"alpha": 7}, "is scaled by 2; the recipe's lora.alpha and lora.r say 1.75"),
        ({"targets": ["w1"]}, "the recipe does not train it; make lora.targets"),
        ({"variant": "dora"}, "the recipe trains it and the adapter lacks it"),
    ],
)
def test_an_adapter_that_the_recipe_would_not_make_is_refused(
    small_dir: Path, tmp_path: Path, values: dict[str, Any], expected: str
) -> None:
    written(small_dir, tmp_path / "a", options())
    with pytest.raises(UserError, match=expected):
        check_first_adapter(options(**values, init_from=str(tmp_path / "a")), Base.read(small_dir))


def test_rows_that_the_adapter_lacks_start_from_the_base_and_others_are_refused(
    small_dir: Path, tmp_path: Path
) -> None:
    written(small_dir, tmp_path / "without", options())
    without = options(special_rows="on", init_from=str(tmp_path / "without"))
    check_first_adapter(without, Base.read(small_dir))
    written(small_dir, tmp_path / "rows", options(special_rows="on"))
    with pytest.raises(UserError, match="lora.special_rows match"):
        check_first_adapter(options(init_from=str(tmp_path / "rows")), Base.read(small_dir))
    written(small_dir, tmp_path / "other", options(), [304, 305, 7])
    other = options(special_rows="on", init_from=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"rows \[7, 304, 305\] of .*; expected \[304, 305, 306\]"):
        check_first_adapter(other, Base.read(small_dir))


def test_the_official_adapter_fits_its_own_recipe(small_dir: Path, golden: Path) -> None:
    official = options(init_from=str(golden / "lora" / "adapter"))
    check_first_adapter(official, Base.read(small_dir))
