"""Number types with a range."""

from __future__ import annotations

import pytest

from qwen_ds.errors import UserError
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
