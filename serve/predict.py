"""Answers to the questions in files: one JSON object a row, in the order of the input.

    python -m serve.predict --model DIR_OR_HUB_ID [--adapter DIR] --input FILE... --output FILE
    python -m serve.predict --model DIR_OR_HUB_ID --adapter NAME=DIR ... --input FILE... ...
    python -m serve.predict --endpoint URL --input FILE... --output FILE
    deepspeed --num_gpus 8 --module serve.predict ...          # the ranks share the rows

A line of the output: id (0, 1, ..), row_id (the row's own id, if it has one), kept (the columns
named by --keep), adapter (where adapters have names: the row's, or null for the bare base), source
("file:line"), prompt (the last question), prediction, reference (the row's own answer, or null),
finish_reason (stop, or length: cut at max_new_tokens), prompt_tokens, completion_tokens, logprobs
(with --logprobs), and prompt_tokens_cut where a prompt was too long. A row that fails alone has the
finish_reason error, and why in error. A killed run is resumed by the same command. `--output -`
writes to standard output, once all rows are done; not under deepspeed's launcher, which writes
there, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from qwen_ds import dist
from qwen_ds.disk.place import cache_home, require_folder
from qwen_ds.errors import UserError
from qwen_ds.runlog import run_command
from qwen_ds.terminal import require_stdout, show, show_json
from serve.engine.loading import silence_libraries
from serve.files.prediction import predict
from serve.options import PredictOptions, parse


def main() -> int:
    options = parse(PredictOptions, __doc__.split("\n\n")[0])
    silence_libraries()
    if options.output == "-":
        _predict_to_stdout(options)
    else:
        _predict_to_file(options, Path(options.output))
    return 0


def _predict_to_file(options: PredictOptions, output: Path) -> bool:
    """Predict, and say how it went; whether this is the rank that has written the output."""
    figures = predict(options.model, options.input, output, options)
    if figures is None:
        return False
    rate = figures.rows_of_this_run / figures.seconds if figures.seconds else 0.0
    cut = f", {figures.prompts_cut} prompts cut" if figures.prompts_cut else ""
    failed = f", {figures.failed} with an error in place of an answer" if figures.failed else ""
    rows = f"{options.output}: {figures.rows} rows{cut}{failed}"
    show(f"{rows}; {figures.seconds:.1f} s, {rate:.2f} rows/s")
    return True


def _predict_to_stdout(options: PredictOptions) -> None:
    """Predict into a file that all ranks know and a second try finds again, and print that.

    Until then whatever is printed goes to stderr.
    """
    if dist.started_by_deepspeed():
        raise UserError(
            "--output is - under the deepspeed launcher, which writes lines of its own to standard"
            " output; expected a file, or another launcher"
        )
    require_stdout()
    key = json.dumps(asdict(options), sort_keys=True, default=str).encode(errors="replace")
    folder = cache_home() / "predictions"
    require_folder(folder, make=True)
    output = folder / f"{hashlib.sha256(key).hexdigest()[:32]}.jsonl"
    with contextlib.redirect_stdout(sys.stderr):
        is_writer = _predict_to_file(replace(options, overwrite=True), output)
    if is_writer:
        with output.open(encoding="utf-8") as lines:
            show_json(line.rstrip("\n") for line in lines)
        output.unlink()


if __name__ == "__main__":
    run_command(main)
