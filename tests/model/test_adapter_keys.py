"""Names of adapters' tensors, whoever wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.errors import UserError
from qwen_ds.model.adapter_keys import (
    PEFT_PREFIX,
    check_pairs,
    inferred_config,
    sort_keys,
    token_indices,
)
from qwen_ds.model.family import QWEN

FOLDER, MODULE = Path("adapter"), QWEN.example
KEY = f"{PEFT_PREFIX}{MODULE}"


@pytest.mark.parametrize(
    ("in_file", "part", "suffix"),
    [
        ("module.{}.lora_A.default.weight", "lora_A", "lora_A.weight"),
        ("{}.lora_B.weight", "lora_B", "lora_B.weight"),
        ("{}.lora_magnitude_vector.default.weight", "lora_magnitude_vector", None),
        ("{}.token_adapter.trainable_tokens_delta", "rows", "token_adapter.trainable_tokens_delta"),
        ("base_model.model.{}.modules_to_save.default.weight", "weight", "weight"),
        ("{}.base_layer.bias", "bias", "bias"),
    ],
)
def test_every_writers_name_becomes_pefts(in_file: str, part: str, suffix: str | None) -> None:
    name = in_file.format(MODULE)
    names, parts = sort_keys(FOLDER, {name: None})
    key = f"{KEY}.{suffix or part}"
    assert (names, parts) == ({key: name}, {MODULE: {part: key}})


@pytest.mark.parametrize("name", ["model.layers.0.lora_A.weight", f"{MODULE}.lora_C.weight"])
def test_an_unknown_name_is_refused_with_an_example(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown tensor {name}; .*{KEY}"):
        sort_keys(FOLDER, {name: None})


def test_two_names_of_one_tensor_are_refused() -> None:
    two = (f"{MODULE}.lora_A.weight", f"module.{MODULE}.lora_A.default.weight")
    with pytest.raises(UserError, match="are the same tensor"):
        sort_keys(FOLDER, dict.fromkeys(two))


def test_a_low_rank_tensor_needs_its_partner_and_all_its_values() -> None:
    pair = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m"}
    whole = {"a": (8, 24), "b": (72, 8), "m": (72,)}
    check_pairs(FOLDER, {MODULE: pair}, whole)
    with pytest.raises(UserError, match="a has no lora_B beside it"):
        check_pairs(FOLDER, {MODULE: {"lora_A": "a"}}, whole)
    for key, shape in (("b", (0,)), ("a", (0, 24)), ("m", (72, 1))):
        with pytest.raises(UserError, match=f"{key} is .*; expected a whole tensor"):
            check_pairs(FOLDER, {MODULE: pair}, whole | {key: shape})


def test_a_configuration_is_inferred_from_the_shapes() -> None:
    parts = {f"m{i}": {"lora_A": f"a{i}", "lora_B": f"b{i}"} for i in range(3)}
    shapes = {"a0": (8, 24), "a1": (8, 24), "a2": (4, 24)}
    config = inferred_config(parts, shapes, alpha=16.0)
    assert (config["r"], config["rank_pattern"], config["lora_alpha"]) == (8, {"m2": 4}, 16.0)


@pytest.mark.parametrize("listed", [[1, 2, 3], {"wte": [1, 2, 3]}])
def test_rows_of_tokens_are_as_many_as_are_listed(listed: object) -> None:
    config = {"trainable_token_indices": listed}
    assert token_indices(FOLDER, config, "transformer.wte", 3) == (1, 2, 3)
    with pytest.raises(UserError, match="replaces 2 rows; trainable_token_indices lists 3"):
        token_indices(FOLDER, config, "transformer.wte", 2)
