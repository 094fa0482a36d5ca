"""Answers to the questions in files: one JSON object a row, in the order of the input.

    python -m serve.predict --model DIR_OR_HUB_ID [--adapter DIR] --input FILE... --output FILE
    deepspeed --num_gpus 8 --module serve.predict ...          # each rank answers every eighth row

A line of the output: id (0, 1, ..), source ("file:line"), prompt (the last question), prediction,
reference (the row's own answer, or null), finish_reason (stop, or length: cut at max_new_tokens),
prompt_tokens, completion_tokens, and prompt_tokens_cut where a prompt was too long. A killed run is
resumed by the same command.
"""

from __future__ import annotations

from pathlib import Path

from qwen_ds.runlog import run_command
from serve.engine.loading import silence_libraries
from serve.files.prediction import predict
from serve.options import PredictOptions, parse


def main() -> int:
    options = parse(PredictOptions, __doc__.split("\n\n")[0])
    silence_libraries()
    output = Path(options.output)
    figures = predict(options.model, options.input, output, options)
    if figures:
        rate = figures.rows_of_this_run / figures.seconds if figures.seconds else 0.0
        cut = f", {figures.prompts_cut} prompts cut" if figures.prompts_cut else ""
        print(f"{output}: {figures.rows} rows{cut}; {figures.seconds:.1f} s, {rate:.2f} rows/s")
    return 0


if __name__ == "__main__":
    run_command(main)
