"""Prediction over files, by one rank or many: every input row gives one line of the output."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_ds import dist
from qwen_ds.data.read.places import locate
from qwen_ds.decode.batch import Completion, DecodingRow
from qwen_ds.decode.exceptions import DecodingError, LogitsNotFinite, RowOutOfMemory
from qwen_ds.disk.adapter_folder import tell_adapter
from qwen_ds.disk.place import output_file, refuse_input
from qwen_ds.errors import UserError
from qwen_ds.model.adapter import check_adapter_fits, read_adapter
from qwen_ds.model.folder import ModelFolder, find_model
from qwen_ds.model.shapes import state_shapes
from qwen_ds.runlog import say
from serve.engine.loading import load_engine
from serve.files.parts import (
    PredictionParts,
    Settings,
    check_output,
    file_state,
    held_output,
    made_folder,
    remove_parts,
)
from serve.files.prompts import PromptReader, PromptRow
from serve.files.ranks import RankWatch, SignOfLife
from serve.options import AnswerOptions

# Batches whose rows are sorted by length together: enough for little padding, and few in memory.
WINDOW = 64

_SETTINGS = (
    "do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "dtype", "long_prompts",
    "limit", "format", "columns", "system", "encoding", "special_tokens_in_text",
)  # fmt: skip

# Errors of the engine, worded for the user of a command, who can change its options.
_IN_OPTIONS: dict[type[DecodingError], str] = {
    LogitsNotFinite: "{}: float16 overflows, try --dtype bfloat16",
    RowOutOfMemory: "one row does not fit the GPU's memory; expected a shorter prompt or fewer "
    "--max_new_tokens",
}


@dataclass(frozen=True, slots=True)
class PredictionFigures:
    """Figures of a run of all ranks; its seconds were not spent on an interrupted run's rows."""

    rows: int
    rows_of_this_run: int
    prompts_cut: int
    seconds: float


def predict(
    model: str,
    paths: Sequence[str],
    output: Path,
    options: AnswerOptions,
    needs_reference: bool = False,
    keeps_parts: bool = False,
) -> PredictionFigures | None:
    """Answer every row of `paths` into `output`: each rank answers its share, rank 0 joins them.

    Returns figures on rank 0, once the output is complete; None on other ranks, once their share
    is. With `keeps_parts` the caller removes the parts of the output: until then the same call
    knows a finished output for its own. UserError: anything wrong with model, input or output,
    before the first row is answered; or another process writes this output.
    """
    output = output_file(output)
    with ExitStack() as held:
        if dist.rank() == 0:
            held.enter_context(held_output(output))
            check_output(output, options.overwrite)
        else:
            held.enter_context(made_folder(output.parent))
        if dist.world_size() > 1:
            held.callback(SignOfLife(output, dist.rank()).stop)
        watch = RankWatch(output, dist.world_size(), dist.rank())
        held.callback(watch.stop)
        figures = _predict(held, watch, model, paths, output, options, needs_reference)
        if figures is not None and not keeps_parts:
            remove_parts(output)
        return figures


def _predict(
    held: ExitStack,
    watch: RankWatch,
    model: str,
    paths: Sequence[str],
    output: Path,
    options: AnswerOptions,
    needs_reference: bool,
) -> PredictionFigures | None:
    rank, timeout = dist.rank(), options.timeout_minutes * 60
    old = file_state(output) if options.overwrite else None
    folder = find_model(model)
    if options.adapter is not None:  # checked before minutes of reading rows
        adapter = read_adapter(tell_adapter(options.adapter), allow_pickle=options.allow_pickle)
        for note in check_adapter_fits(adapter, state_shapes(folder.config)):
            say(f"{adapter.folder}: {note}")
        options = replace(options, adapter=str(adapter.folder))
    context = folder.family.context(folder.config)
    reader = PromptReader(paths, options, folder.encoding, context, needs_reference)
    settings = settings_of(folder.path, paths, options)
    refuse_input(output, [file for files in _files_of(settings) for file in files] + [*paths])
    parts: PredictionParts | None
    prompts_cut = 0
    if rank == 0:
        rows, prompts_cut = reader.survey()
        parts = PredictionParts.prepare(output, settings, rows, options.overwrite)
        parts.watch(watch)
    else:
        parts = PredictionParts.join_in(output, settings, rank, timeout, old, watch)
    if parts is None:
        return None
    held.callback(parts.close)
    started, done_before = time.monotonic(), parts.refresh()
    if done_before:
        say(f"{parts.folder}: {done_before} of {parts.rows} rows are there from an interrupted run")
    with tqdm(
        total=parts.rows,
        initial=done_before,
        unit="row",
        desc="predict",
        disable=rank != 0,
        delay=0.1,  # an error while loading gets a line of its own
        mininterval=0.5 if sys.stderr.isatty() else 60.0,  # a log file gets a line a minute
    ) as bar:
        seconds_loading = _answer_share(folder, reader, parts, options, bar)
        if rank != 0:
            return None
        parts.wait(timeout, lambda finished: bar.update(finished - bar.n))
    seconds = time.monotonic() - started - seconds_loading
    parts.join()
    return PredictionFigures(parts.rows, parts.rows - done_before, prompts_cut, seconds)


def _answer_share(
    folder: ModelFolder,
    reader: PromptReader,
    parts: PredictionParts,
    options: AnswerOptions,
    bar: tqdm,
) -> float:
    """Answer this rank's unanswered rows; return the seconds that loading the model took."""
    rank, world = dist.rank(), dist.world_size()
    mine = (row for row in reader if row.id % world == rank and not parts.is_finished(row.id))
    sampling, engine, seconds_loading = options.sampling(), None, 0.0
    while window := list(islice(mine, WINDOW * options.batch_size)):
        if engine is None:  # not before: without anything to do no model is loaded
            started = time.monotonic()
            engine = load_engine(
                folder,
                options.adapter,
                options.device,
                options.dtype,
                allow_pickle=options.allow_pickle,
            )
            seconds_loading = time.monotonic() - started
        rows = [DecodingRow(row.ids, sampling.of_row(row.id), engine.stop) for row in window]
        batch: list[dict[str, Any]] = []
        try:
            for i, completion in engine.stream(rows, options.batch_size):
                batch.append(answer(window[i], completion))
                if len(batch) == options.batch_size:
                    parts.append(batch)
                    batch = []
                    bar.update(parts.refresh() - bar.n)
        except DecodingError as error:
            raise UserError(_IN_OPTIONS.get(type(error), "{}").format(error)) from None
        parts.append(batch)
    return seconds_loading


def answer(row: PromptRow, completion: Completion) -> dict[str, Any]:
    """The line of the output file."""
    line: dict[str, Any] = {
        "id": row.id,
        **row.own,
        "source": row.source,
        "prompt": row.prompt,
        "prediction": completion.text,
        "reference": row.reference,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.ids),
    }
    return line | {"prompt_tokens_cut": row.tokens_cut} if row.tokens_cut else line


def settings_of(folder: Path, paths: Sequence[str], options: AnswerOptions) -> Settings:
    """Everything that an answer depends on: options, and files by path, size and time of change."""
    values: dict[str, Any] = {name: vars(options)[name] for name in _SETTINGS}
    values["keep"] = list(options.keep) or None
    values["model"] = _files_in(folder)
    values["adapter"] = _files_in(Path(options.adapter)) if options.adapter else None
    values["input"] = [[str(p), [_file_card(f) for f in locate(p).files]] for p in paths]
    return values


def _files_of(settings: Settings) -> Iterator[list[str]]:
    """The names of all files that answers depend on."""
    for cards in (settings["model"], settings["adapter"] or [], *(c for _, c in settings["input"])):
        yield [name for name, _, _ in cards]


def _files_in(folder: Path) -> list[list[Any]]:
    # Hidden files are nothing of a model's, and those of an output beside it come and go.
    files = (file for file in sorted(folder.iterdir()) if not file.name.startswith("."))
    return [_file_card(file) for file in files if file.is_file()]


def _file_card(file: Path) -> list[Any]:
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
