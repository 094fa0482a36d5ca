"""Fine-tune Qwen: deepspeed --num_gpus N launch/train.py [--config RECIPE] [--section.key VALUE]"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from qwen_ds.errors import EXIT_STOPPED
from qwen_ds.recipe.loading import load_recipe
from qwen_ds.runlog import run_command

DEMO_RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"


def main() -> int:
    # DeepSpeed's launcher adds --local_rank to every command.
    options = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    note = "" if options else "no options given: the embedded demo (launch/recipes/demo.yaml)"
    # Options first, DeepSpeed last: neither --help nor a mistake should wait for imports, and a
    # typo must not cost the minutes that tokenising rows and loading a base take.
    asked = load_recipe(options or ["--config", str(DEMO_RECIPE)])
    from qwen_ds.plan.resolve import check
    from qwen_ds.plan.sources import check_sources

    check(asked)
    check_sources(asked)
    logging.disable(logging.WARNING)  # DeepSpeed logs to the terminal while it is imported
    from qwen_ds.train.run import run

    logging.disable(logging.NOTSET)
    return run(asked, note)


if __name__ == "__main__":
    # Before the first step there is nothing to save: the code says that the same command resumes.
    run_command(main, stopped_code=EXIT_STOPPED)
