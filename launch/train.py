"""Fine-tune Qwen:  deepspeed --num_gpus N launch/train.py [--config RECIPE] [--section.key VALUE ...]"""

from __future__ import annotations

import sys
from pathlib import Path

DEMO_RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"


def main() -> int:
    from qwen_ds.train.run import run

    options = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    if not options:
        return run(["--config", str(DEMO_RECIPE)], "no options given: the embedded demo (launch/recipes/demo.yaml)")
    return run(options)


if __name__ == "__main__":
    from qwen_ds.errors import run_command

    run_command(main)
