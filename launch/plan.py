"""Predict what a recipe needs on a machine: memory by part, time of a step, and the best command.

    python launch/plan.py --config launch/recipes/lora_zero2.yaml --gpus 8 --gpu h100

It takes the options that launch/train.py takes, and plans the run that training would make. A
model's folder may be without weights, and none are fetched; those that are there are checked as
training checks them. Without --model.path it is Qwen-7B.
"""

from __future__ import annotations

import sys

from qwen_ds.errors import EXIT_DONE
from qwen_ds.plan.run import Base
from qwen_ds.plan.sources import find_sources
from qwen_ds.plan.table import PlanOptions, plan, plan_text, without_options
from qwen_ds.recipe.loading import load_recipe, recipe_parser
from qwen_ds.runlog import run_command
from qwen_ds.terminal import show


def main() -> int:
    parser = recipe_parser()
    parser.description = "Predict memory and time of a recipe, and print the best command."
    parser.add_class_arguments(PlanOptions)
    asked = load_recipe(parser=parser)
    base = Base.qwen_7b()
    if "model.path" in asked.set_keys:
        asked, model = find_sources(asked, weights="if there")
        base = Base.of(model)
    # The command that is printed is for training: without the planner's and the launcher's options.
    ours = {f"--{name}" for name in asked.added} | {"--local_rank", "--local-rank"}
    words = without_options(sys.argv[1:], ours)
    show(plan_text(plan(asked, PlanOptions(**asked.added), base), words))
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
