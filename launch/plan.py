"""What a recipe needs on a machine, before it runs: memory by part, time of a step, and the best command.

    python launch/plan.py --config launch/recipes/lora_zero2.yaml --gpus 8 --gpu_memory 80 --gpu h100

All options of a recipe are taken as launch/train.py takes them. Nothing is loaded but the model's config.json; without
--model.path it is Qwen-7B's.
"""

from __future__ import annotations

import sys


def main() -> int:
    from qwen_ds.errors import EXIT_DONE
    from qwen_ds.plan.table import PlanOptions, plan_text
    from qwen_ds.recipe.loading import load_recipe_with, recipe_parser

    parser = recipe_parser()
    parser.description = (
        "Predict memory and time of a recipe on a machine, and print the best command."
    )
    parser.add_class_arguments(PlanOptions)
    loaded, own = load_recipe_with(parser, None)
    options = PlanOptions(**own)
    names = {f"--{name}" for name in own}
    print(plan_text(loaded, options, recipe_words(sys.argv[1:], names)))
    return EXIT_DONE


def recipe_words(words: list[str], own: set[str]) -> list[str]:
    """The command line without this command's own options."""
    kept, skip = [], False
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            skip = name in own or name.startswith(("--local_rank", "--local-rank"))
            if skip and value:
                continue
        if not skip:
            kept.append(word)
    return kept


if __name__ == "__main__":
    from qwen_ds.runlog import run_command

    run_command(main)
