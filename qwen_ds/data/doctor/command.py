"""The command `check`: the pass, its findings, and the files that were asked for."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from qwen_ds.data.doctor.examine import AGAINST, EVAL, TRAIN, Pass, examine
from qwen_ds.data.doctor.judge import judge
from qwen_ds.data.doctor.limits import Cuts, num_without_limit
from qwen_ds.data.doctor.options import CheckCommand
from qwen_ds.data.doctor.output import (
    PAGE,
    Sorting,
    findings_file,
    outputs,
    write_results,
)
from qwen_ds.data.doctor.places import Places
from qwen_ds.data.doctor.table import table
from qwen_ds.data.doctor.tally import FindingTally, has_any
from qwen_ds.data.read.dialogue import Result
from qwen_ds.data.read.sources import iter_conversations
from qwen_ds.data.rows.data_report import not_read_line
from qwen_ds.data.rows.reading import read_options
from qwen_ds.errors import UserError
from qwen_ds.terminal import show

if TYPE_CHECKING:
    from qwen_ds.model.folder import ModelFolder


def run_check(options: CheckCommand) -> int:
    """Check the rows of data.train and data.eval; returns the exit code.

    UserError: nothing to read, an output that exists or is an input, a file that cannot be read.
    """
    data = options.data
    if not data.train:
        raise UserError("check was given no files; expected check FILE...")
    if options.adapter is not None and options.model is None:
        raise UserError("--adapter is given without --model; expected the base it was trained on")
    paths = [*options.against, *data.eval, *data.train]
    iter_conversations(paths, read_options(data))  # checks the paths
    places = outputs(options.output, options.write, paths, options.overwrite)
    model = _model(options)
    with ExitStack() as stack:
        tally = FindingTally(Places(), stack.enter_context(findings_file(places)))
        sorting = None
        if places.clean is not None:
            sorting = Sorting(places.clean)
            stack.callback(sorting.close)
        gathered = _pass(options, tally, sorting, model)
        found = judge(gathered, data, None if model is None else model.config.seq_length)
        ranked = None
        if model is not None:
            from qwen_ds.data.doctor.losses import rank

            ranked = rank(options, model, gathered, places)
        kept = None
        if sorting is not None:
            kept = sorting.write(tally)
        summary = _summary(options, gathered, found, ranked, kept)
        if places.folder is not None:
            write_results(places.folder, summary)
    show("\n".join([*table(summary["findings"]), *_last_lines(summary, options)]))
    return int(options.fail_on != "never" and has_any(summary["findings"], options.fail_on))


def _model(options: CheckCommand) -> ModelFolder | None:
    if options.model is None:
        return None
    from qwen_ds.model.folder import find_model

    return find_model(options.model)


def _pass(
    options: CheckCommand, tally: FindingTally, sorting: Sorting | None, model: ModelFolder | None
) -> Pass:
    data = options.data
    sides = [(AGAINST, path) for path in options.against]
    sides += [(EVAL, path) for path in data.eval] + [(TRAIN, path) for path in data.train]
    first_of_train = len(options.against) + len(data.eval)

    def on_record(record: int, row: object, result: Result) -> None:
        if sorting is not None and tally.places.path_of(record) >= first_of_train:
            sorting.add(record, row, result)

    encoding = None if model is None else model.encoding
    return examine(sides, read_options(data), tally, encoding, on_record)


def _summary(
    options: CheckCommand, gathered: Pass, cuts: list[Cuts], ranked: dict[str, Any] | None,
    kept: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The content of summary.json."""
    names = {AGAINST: "against", EVAL: "eval", TRAIN: "train"}
    rows = {name: 0 for name in ("train", "eval", "against")}
    for side, columns in gathered.files:
        rows[names[side]] += columns.rows
    found: dict[str, Any] = {
        "rows": rows["train"],
        "rows_of_eval": rows["eval"],
        "rows_of_test_sets": rows["against"],
        "files": {columns.path: columns.rows for _, columns in gathered.files},
        "not_trained_on": dict(gathered.not_trained),
        "not_read": {path: dict(keys) for path, keys in gathered.not_read.items() if keys},
        "tokens": "estimated" if options.model is None else "counted",
        "cut_by_limit": {
            each.option: {
                "value": each.value,
                "rows": int(each.is_cut_N.sum()),
                "shares": {str(value): round(share, 6) for value, share in each.shares.items()},
            }
            for each in cuts
        },
        "findings": gathered.tally.findings(gathered.files),
    }
    if options.model is None and (rows_left := _without_limit(options, gathered)):
        found["rows_without_limit"] = rows_left
    if kept is not None:
        found |= {"kept": kept, "dropped": rows["train"] - kept}
    return found | ({} if ranked is None else {"losses": ranked})


def _without_limit(options: CheckCommand, gathered: Pass) -> int:
    """The number of training rows whose limit only the model or data.max_tokens tells."""
    if gathered.numbers is None:
        return 0
    return num_without_limit(options.data, gathered.numbers.turns_N[gathered.side_N == TRAIN])


def _last_lines(summary: dict[str, Any], options: CheckCommand) -> list[str]:
    rows = summary["rows"]
    lines = [f"{rows:,} rows checked"]
    if summary["rows_of_eval"]:
        lines[0] += f", {summary['rows_of_eval']:,} of data.eval"
    if summary["rows_of_test_sets"]:
        lines[0] += f", against {summary['rows_of_test_sets']:,} of test sets"
    if summary["cut_by_limit"] and summary["tokens"] == "estimated":
        lines.append("tokens are estimated; --model DIR counts them")
    if unknown := summary.get("rows_without_limit"):
        whose = "multi-turn rows" if options.data.learn_on == "original" else "rows"
        lines.append(f"lengths of {unknown:,} {whose} need --model or data.max_tokens")
    several = len(summary["not_read"]) > 1
    lines += [
        not_read_line(keys, path if several else None) for path, keys in summary["not_read"].items()
    ]
    if "kept" in summary:
        lines.append(
            f"{options.write}: {summary['kept']:,} rows; dropped.jsonl: {summary['dropped']:,}"
        )
    if options.output is not None:
        lines.append(f"{options.output}/{PAGE} shows all of it")
    return lines
