"""python -m qwen_ds.demo"""

from __future__ import annotations

from qwen_ds.demo.run import main
from qwen_ds.runlog import run_command

run_command(main)
