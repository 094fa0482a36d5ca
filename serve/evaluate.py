"""Scores of a model's answers against those in the data: as JSON, as a table, and three to look at.

    python -m serve.evaluate --model DIR_OR_HUB_ID [--adapter DIR] --data FILE... --output_dir DIR
    python -m serve.evaluate --predictions FILE [--data FILE...] --output_dir DIR
    deepspeed --num_gpus 8 --module serve.evaluate ...

Options of decoding and adapters by name are those of serve.predict. --output_dir gets
predictions.jsonl (see there) and metrics.json. With --predictions nothing is generated: that file
is scored. The scores are defined in serve/scores/metrics.py.
"""

from __future__ import annotations

from qwen_ds.runlog import run_command
from serve.engine.loading import silence_libraries
from serve.options import EvaluateOptions, parse
from serve.scores.report import evaluate


def main() -> int:
    options = parse(EvaluateOptions, __doc__.split("\n\n")[0])
    silence_libraries()
    evaluate(options)
    return 0


if __name__ == "__main__":
    run_command(main)
