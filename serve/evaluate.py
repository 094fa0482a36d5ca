"""Scores of models' answers against those in the data: as JSON, as a table, and some to look at.

    python -m serve.evaluate --model DIR_OR_HUB_ID [--adapter DIR] --data FILE... --output_dir DIR
    python -m serve.evaluate --compare BASE [NAME=]MODEL... --data FILE... --output_dir DIR
    python -m serve.evaluate --model BASE --compare BASE [NAME=]ADAPTER... --data FILE... ...
    python -m serve.evaluate --predictions [NAME=]FILE... [--data FILE...] --output_dir DIR
    deepspeed --num_gpus 8 --module serve.evaluate ...

Options of decoding and adapters by name are those of serve.predict. --output_dir gets
predictions.jsonl (see there), rows.jsonl (the scores of each row), metrics.json and speed.json;
where several are compared, of each in a folder of its name, and comparison.json. With --predictions
nothing is generated: those files are scored. The exit code is 1 if something of --require is
missed. A killed evaluation is resumed by the same command. The scores are defined in
serve/scores/profiles.py.
"""

from __future__ import annotations

from qwen_ds.errors import EXIT_DONE, EXIT_FAILURE
from qwen_ds.runlog import run_command
from serve.engine.loading import silence_libraries
from serve.options import EvaluateOptions, parse
from serve.scores.report import evaluate


def main() -> int:
    options = parse(EvaluateOptions, __doc__.split("\n\n")[0])
    silence_libraries()
    report = evaluate(options)
    is_missed = report is not None and any(not one["met"] for one in report["gate"])
    return EXIT_FAILURE if is_missed else EXIT_DONE


if __name__ == "__main__":
    run_command(main)
