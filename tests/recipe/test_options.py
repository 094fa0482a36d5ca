"""The options' defaults."""

from __future__ import annotations

from qwen_ds.recipe.loading import load_recipe
from qwen_ds.recipe.options import Recipe


def test_defaults_are_the_original_projects() -> None:
    recipe = load_recipe([]).recipe
    assert recipe == Recipe()
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (8, 16, 0.05)
    assert recipe.lora.targets == ["c_attn", "c_proj"]
    assert (recipe.optim.lr, recipe.optim.schedule, recipe.optim.epochs) == (3e-4, "constant", 3.0)
    assert (recipe.batch.rows_per_step, recipe.save.every_steps) == (128, 382)
    assert (recipe.data.max_prompt_tokens, recipe.data.max_answer_tokens) == (254, 254)
