"""A configuration, read as peft reads it; tests/serve/engine holds it to peft's own decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from qwen_ds.errors import UserError
from qwen_ds.model.adapter_asked import asked, token_rows_of
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.shapes import state_shapes

SHAPES = state_shapes(QWenConfig(num_hidden_layers=12))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn", "w1"]},
        {"target_modules": ["h.1.attn.c_attn", "lm_head"]},
        {"target_modules": ["transformer.h.3.mlp.w1", "c_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["c_proj"], "layers_to_transform": 1, "layers_pattern": ["x", "h"]},
        {"target_modules": ["c_proj"], "layers_to_transform": []},
        {"target_modules": r".*\.1\d?\..*(c_attn|w2)"},
        {"target_modules": r".*c_attn", "exclude_modules": r".*h\.1\..*"},
        {"target_modules": ["c_attn", "w1"], "exclude_modules": ["1.attn.c_attn", "w1"]},
        {"target_modules": ["c_attn", "c_proj"], "modules_to_save": ["h.1", "mlp"]},
        {"target_modules": ["c_attn", "c_proj"], "modules_to_save": ["proj"]},
    ],
    ids=str,
)
def test_targets_are_those_of_peft(options: dict[str, Any]) -> None:
    config = LoraConfig(**options)
    modules = [name.removesuffix(".weight") for name in SHAPES if name.endswith(".weight")]
    expected = [name for name in modules if check_target_module_exists(config, name)]
    if options.get("modules_to_save") == ["proj"]:  # peft would train those in two ways
        with pytest.raises(UserError, match="both name transformer.h.0.attn.c_proj"):
            asked(Path("a"), options, SHAPES)
        return
    assert set(asked(Path("a"), options, SHAPES).targets) == set(expected)


def test_saved_modules_are_named_by_their_last_letters_with_all_below() -> None:
    options = {"target_modules": ["c_attn"], "modules_to_save": ["h.1.mlp", "_f", "nothing"]}
    found = asked(Path("a"), options, SHAPES)
    names = {"transformer.ln_f.weight"}
    names |= {f"transformer.h.1.mlp.{name}.weight" for name in ("w1", "w2", "c_proj")}
    assert found.saved == dict.fromkeys(names, "modules_to_save")
    assert found.notes == ("modules_to_save names nothing, which this base does not have",)


def test_token_rows_are_listed_for_the_embedding_or_by_module() -> None:
    listed = {"trainable_token_indices": [3, 4], "target_modules": ["c_attn"]}
    assert asked(Path("a"), listed, SHAPES).token_rows == {"transformer.wte": (3, 4)}
    assert token_rows_of(listed, "lm_head") is None
    named = listed | {"trainable_token_indices": {"wte": [3], "lm_head": [5]}}
    assert asked(Path("a"), named, SHAPES).token_rows == {"transformer.wte": (3,), "lm_head": (5,)}
    assert token_rows_of(named, "lm_head") == [5]
    twice = listed | {"trainable_token_indices": {"wte": [3], "transformer.wte": [5]}}
    with pytest.raises(UserError, match="names transformer.wte twice"):
        asked(Path("a"), twice, SHAPES)
