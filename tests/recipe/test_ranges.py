"""Number types with a range."""

from __future__ import annotations

import pytest

from qwen_ds.errors import UserError
from qwen_ds.recipe import ranges
from qwen_ds.recipe.loading import load_recipe


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("lora.r", "1", "0"),
        ("seed", "0", "-1"),
        ("model.memory_gb", "0.1", "0"),
        ("optim.weight_decay", "0", "-0.1"),
        ("lora.dropout", "0.99", "1"),
        ("data.max_prompt_tokens", "3", "2"),
        ("data.max_answer_tokens", "2", "1"),
        ("data.max_tokens", "16", "15"),
        ("data.eval_fraction", "0.99", "1.0"),
    ],
)
def test_a_range_ends_where_it_says(key: str, inside: str, outside: str) -> None:
    load_recipe([f"--{key}", inside])
    with pytest.raises(UserError, match=f"{key} is {outside}; expected "):
        load_recipe([f"--{key}", outside])


def test_a_number_is_plain_again_and_anything_else_stays() -> None:
    number = load_recipe(["--lora.r", "4"]).recipe.lora.r
    assert type(number) is not int and type(ranges.plain_number(number)) is int
    assert ranges.plain_number(True) is True and ranges.plain_number("x") == "x"
