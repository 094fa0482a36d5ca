"""Look at a data set as a model is trained on it.

    python -m qwen_ds.data encode  --model.path DIR --data.train FILE... [--output rows.jsonl]
    python -m qwen_ds.data inspect --model.path DIR --data.train FILE... [--rows 3] [--at FILE:LINE]
    python -m qwen_ds.data check FILE... [--data.eval FILE...] [--against FILE...] [--model DIR]
                                 [--write clean.jsonl] [--output DIR] [--fail_on warn]

encode writes one JSON object a row: input_ids, labels (-100: not a target), source. inspect prints
rows with their target tokens in green, and the row lengths. Both use the same cache as training.
check names what is wrong with the rows. All take the data.* options of a recipe.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from qwen_ds import dist
from qwen_ds.data.doctor.options import CheckCommand
from qwen_ds.data.options import EncodeCommand, InspectCommand, RowOptions
from qwen_ds.disk.place import output_file, refuse_input
from qwen_ds.disk.write import replacing
from qwen_ds.errors import UserError
from qwen_ds.recipe.parser import parse_options
from qwen_ds.runlog import run_command
from qwen_ds.terminal import show, show_json, visible

if TYPE_CHECKING:
    from qwen_ds.data.rows.token_rows import TokenRows
    from qwen_ds.model.tokenizer import Encoding


def prepared(options: RowOptions) -> tuple[TokenRows, Encoding]:
    """All rows of data.train, each once, and the vocabulary that encoded them."""
    from qwen_ds.data.rows.token_rows import prepare
    from qwen_ds.model.folder import find_model

    model = find_model(options.model.path, weights=False)
    encoding = model.encoding
    data = replace(options.data, weights=None, eval=[], eval_fraction=0.0)
    return prepare(data, encoding, model.config.seq_length).train, encoding


def encode(options: EncodeCommand) -> None:
    """Write the rows to a file, complete or absent, or to standard output. UserError if the file
    exists or cannot be written."""
    from qwen_ds.data.read.places import locate
    from qwen_ds.data.rows.data_report import summary

    path = None if options.output is None else output_file(options.output)
    if path is not None:
        train = options.data.train
        refuse_input(path, [*train, *(file for each in train for file in locate(each).files)])
    if path is not None and path.exists() and not options.overwrite:
        raise UserError(f"{path}: exists; expected a new file, or --overwrite")
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; expected one for --output")
    rows, _ = prepared(options)

    def lines() -> Iterator[str]:
        for row in range(len(rows)):
            ids, labels = (part.tolist() for part in rows[row])
            found = {"input_ids": ids, "labels": labels, "source": rows.source(row)}
            yield json.dumps(found)

    if path is None:
        show_json(lines())
    else:
        try:
            with replacing(path) as unfinished, unfinished.open("w", encoding="ascii") as file:
                file.writelines(f"{line}\n" for line in lines())
        except OSError as error:
            came = error.strerror or error
            raise UserError(f"{path}: {came}; expected a file that can be written") from error
    show("\n".join(summary(rows.report)), err=True)


def inspect(options: InspectCommand) -> None:
    """Print the first rows, or those of one place, then row lengths and the data report. UserError
    if no row comes from that place."""
    from rich.console import Console

    from qwen_ds.data.rows.data_report import summary
    from qwen_ds.data.show import show_lengths, show_row

    rows, encoding = prepared(options)
    shown, at = list(range(min(options.rows, len(rows)))), options.at
    if at is not None:
        shown = [row for row in range(len(rows)) if f"/{rows.source(row)}".endswith(f"/{at}")]
        if not shown:
            expected = f"the file:line of a row that is trained on, such as {rows.source(0)}"
            raise UserError(f"--at is {at}; expected {expected}")
    console = Console(highlight=False, markup=False, emoji=False)  # names are no markup
    for row in shown:
        show_row(rows, row, encoding, console)
    show_lengths(rows.lens, console)
    console.print(visible("\n".join(summary(rows.report))), soft_wrap=True)


def check(options: CheckCommand) -> int:
    """Print what is wrong with the rows; 1 if --fail_on says so."""
    from qwen_ds.data.doctor.command import run_check

    return run_check(options)


# Each with its options, and words for --help.
COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int | None], str]] = {
    "encode": (EncodeCommand, encode, "encode the rows of data.train, each once"),
    "inspect": (InspectCommand, inspect, "show rows of data.train, each once"),
    "check": (CheckCommand, check, "check FILE...: name what is wrong with the rows"),
}


def with_files(words: list[str]) -> list[str]:
    """The words of check, with the files before its options as those of data.train."""
    files = list(takewhile(lambda word: not word.startswith("--"), words))
    if files and any(word.split("=")[0] == "--data.train" for word in words):
        raise UserError(f"check was given {files[0]!r} and --data.train; expected one of them")
    return ["--data.train", *files, *words[len(files) :]] if files else words


def main() -> int:
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        show(__doc__)
        return 0
    if command not in COMMANDS:
        raise UserError(
            f"the command is {command!r}; expected encode, inspect or check: "
            "python -m qwen_ds.data --help"
        )
    kind, run, about = COMMANDS[command]
    if command == "check":
        words = with_files(words)
    options = parse_options(kind, about, words, prog=f"python -m qwen_ds.data {command}")
    if not dist.rank():  # a launcher may have started many ranks, and one of them is enough
        return run(options) or 0
    return 0


if __name__ == "__main__":
    run_command(main)
