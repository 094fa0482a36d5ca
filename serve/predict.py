"""Answers to the questions in files: one JSON object a row, in the order of the input.

    python -m serve.predict --model DIR_OR_HUB_ID [--adapter DIR] --input FILE... --output FILE
    deepspeed --num_gpus 8 --module serve.predict ...            # each rank answers every eighth row

A line of the output: id (0, 1, ..), source ("file:line"), prompt (the last question), prediction, reference (the row's
own answer, or null), finish_reason (stop, or length: cut at max_new_tokens), prompt_tokens, completion_tokens, and
prompt_tokens_cut where a prompt was too long. A killed run goes on where it stopped when its command is given again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_ds import dist
from qwen_ds.data.read.dialogue import Dropped
from qwen_ds.data.read.sources import iter_prompts, locate
from qwen_ds.disk.place import require_folder
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, encode_prompt, footer_ids, header_ids
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.folder import find_model
from qwen_ds.model.tokenizer import Encoding, load_encoding
from qwen_ds.runlog import is_terminal, run_command, say
from serve.engine.engine import Completion, Engine, context_of, silence_libraries
from serve.files.parts import Parts, Settings, check_output, file_state
from serve.options import PredictOptions, RunOptions, parse

WINDOW = 64  # batches whose rows are sorted by length together: little padding, and memory for no more rows than these

_ANSWER_OPTIONS = (
    *(
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "max_new_tokens",
        "seed",
        "dtype",
        "long_prompts",
        "limit",
    ),
    *("format", "columns", "system", "special_tokens_in_text"),
)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One input row, ready to be answered."""

    id: int
    source: str
    prompt: str
    reference: str | None
    ids: tuple[int, ...]
    tokens_cut: int


@dataclass(frozen=True, slots=True)
class Survey:
    """What a look through the whole input found."""

    rows: int
    cut: int


@dataclass(frozen=True, slots=True)
class RunFigures:
    """How a run went. Rows and tokens are those of this run, of all ranks; a part finished earlier is not in them."""

    rows: int
    rows_of_this_run: int
    prompts_cut: int
    seconds: float


class PromptReader:
    """The rows of the input files, as often as wanted. UserError when it comes to a row that cannot be answered."""

    def __init__(
        self,
        paths: Sequence[str],
        options: RunOptions,
        encoding: Encoding,
        context: int,
        needs_reference: bool = False,
    ) -> None:
        self.paths, self.options, self.encoding = paths, options, encoding
        self.needs_reference = needs_reference
        self.context = context
        self.room = context - options.max_new_tokens
        self.tail = len(footer_ids(encoding)) + len(header_ids(encoding, "assistant"))
        if self.room <= self.tail:
            raise UserError(
                f"max_new_tokens is {options.max_new_tokens}; expected room for a prompt in the context of {context}"
            )

    def __iter__(self) -> Iterator[PromptRow]:
        o = self.options
        found = iter_prompts(self.paths, fmt=o.format, columns=o.columns, system=o.system)
        for row_id, (conversation, reference, source) in enumerate(islice(found, o.limit)):
            if isinstance(conversation, Dropped):
                detail = f"; {conversation.detail}" if conversation.detail else ""
                raise UserError(
                    f"{source}: {conversation.reason}; expected a row with a question{detail}"
                )
            if self.needs_reference and (reference is None or not reference.strip()):
                raise UserError(
                    f"{source}: no answer; expected one to compare with (serve.predict needs none)"
                )
            ids, cut = self._encode(conversation, source)
            yield PromptRow(row_id, source, conversation.turns[-1].text, reference, tuple(ids), cut)

    def survey(self) -> Survey:
        """Read everything once: a mistake in the last row shows before the first one is answered."""
        rows = cut = 0
        for row in self:
            rows, cut = rows + 1, cut + (row.tokens_cut > 0)
        if not rows:
            raise UserError(f"{', '.join(map(str, self.paths))}: no rows; expected at least one")
        return Survey(rows, cut)

    def _encode(self, conversation: Conversation, source: str) -> tuple[list[int], int]:
        """Ids of the prompt and how many tokens had to go."""
        parse_specials = self.options.special_tokens_in_text == "parse"
        ids = whole = encode_prompt(self.encoding, conversation, parse_specials)
        if len(ids) > self.room and self.options.long_prompts == "stop":
            raise UserError(
                f"{source}: the prompt has {len(ids)} tokens; expected at most {self.room}, the model's context of "
                f"{self.context} less max_new_tokens ({self.options.max_new_tokens}), or --long_prompts cut"
            )
        turns = conversation.turns
        while len(ids) > self.room and len(turns) > 1:
            turns = turns[2:]
            ids = encode_prompt(self.encoding, replace(conversation, turns=turns), parse_specials)
        if (
            len(ids) > self.room
        ):  # as the original project cuts: the end goes, and what must follow a question stays
            ids = ids[: self.room - self.tail] + ids[-self.tail :]
        return ids, len(whole) - len(ids)


def answer(row: PromptRow, completion: Completion) -> dict[str, Any]:
    """The line of the output file."""
    line: dict[str, Any] = {
        "id": row.id,
        "source": row.source,
        "prompt": row.prompt,
        "prediction": completion.text,
        "reference": row.reference,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
    }
    return line | {"prompt_tokens_cut": row.tokens_cut} if row.tokens_cut else line


def predict(
    model: str,
    paths: Sequence[str],
    output: Path,
    options: RunOptions,
    needs_reference: bool = False,
) -> RunFigures | None:
    """Answer every row of `paths` into `output`: with several ranks, each answers its share and rank 0 joins them.

    Returns:
        Figures on rank 0 once the output is complete; None on the other ranks, when their share is done.

    Raises:
        UserError: anything wrong with the model, the input or the output, before the first row is answered.
    """
    rank, world, timeout = dist.rank(), dist.world_size(), options.timeout_minutes * 60
    if rank == 0:
        check_output(output, options.overwrite)
    old = file_state(output) if options.overwrite else None
    folder = find_model(model)
    reader = PromptReader(
        paths,
        options,
        load_encoding(folder),
        context_of(QWenConfig.from_pretrained(folder)),
        needs_reference,
    )
    settings = settings_of(folder, paths, options)
    survey = None
    if rank == 0:
        survey = reader.survey()
        require_folder(output.parent, make=True)
        parts: Parts | None = Parts.prepare(output, settings, survey.rows, options.overwrite)
    else:
        parts = Parts.join_in(output, settings, rank, timeout, old)
    if parts is None:
        return None
    started, done_before = time.monotonic(), parts.refresh()
    if done_before:
        say(f"{parts.folder}: {done_before} of {parts.rows} rows are there from an interrupted run")
    pace = 0.5 if is_terminal() else 60.0  # seconds: into a log file a line a minute
    with tqdm(
        total=parts.rows,
        initial=done_before,
        unit="row",
        desc="predict",
        disable=rank != 0,
        mininterval=pace,
    ) as bar:
        seconds_loading = _answer_share(folder, reader, parts, options, (rank, world), bar)
        if survey is None:
            parts.close()
            return None
        parts.wait(timeout, lambda finished: _show(bar, finished))
    seconds = time.monotonic() - started - seconds_loading
    parts.join()
    return RunFigures(survey.rows, survey.rows - done_before, survey.cut, seconds)


def _answer_share(
    folder: Path,
    reader: PromptReader,
    parts: Parts,
    options: RunOptions,
    place: tuple[int, int],
    bar: tqdm,
) -> float:
    """Answer the unanswered rows of rank `place[0]` of `place[1]`; returns the seconds that loading the model took."""
    rank, world = place
    mine = (row for row in reader if row.id % world == rank and not parts.is_finished(row.id))
    window = list(islice(mine, WINDOW * options.batch_size))
    if not window:  # nothing to do, and no model to load for it
        return 0.0
    started = time.monotonic()
    engine = Engine.load(folder, options.adapter, options.device, options.dtype)
    seconds_loading = time.monotonic() - started
    while window:
        batch: list[dict[str, Any]] = []
        prompts, row_ids = [row.ids for row in window], [row.id for row in window]
        for i, completion in engine.stream(
            prompts, options.sampling(), batch_size=options.batch_size, row_ids=row_ids
        ):
            batch.append(answer(window[i], completion))
            if len(batch) == options.batch_size:
                parts.append(batch)
                batch = []
                _show(bar, parts.refresh())
        parts.append(batch)
        window = list(islice(mine, WINDOW * options.batch_size))
    return seconds_loading


def _show(bar: tqdm, finished: int) -> None:
    bar.update(finished - bar.n)


def settings_of(folder: Path, paths: Sequence[str], options: RunOptions) -> Settings:
    """Everything that an answer depends on: files by path, size and time of change."""
    values: dict[str, Any] = {name: vars(options)[name] for name in _ANSWER_OPTIONS}
    values["model"] = _files_in(folder)
    values["adapter"] = _files_in(Path(options.adapter)) if options.adapter else None
    values["input"] = [[str(p), [_file_card(f) for f in locate(p).files]] for p in paths]
    return Settings(values)


def _files_in(folder: Path) -> list[list[Any]]:
    return (
        [_file_card(file) for file in sorted(folder.iterdir()) if file.is_file()]
        if folder.is_dir()
        else []
    )


def _file_card(file: Path) -> list[Any]:
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def count_outcomes(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of finished lines: how many ended for which reason, how many are empty, and their tokens."""
    return {
        "rows": len(lines),
        "finish_reasons": dict(
            sorted(
                Counter(
                    line["finish_reason"] for line in lines if line.get("finish_reason")
                ).items()
            )
        ),
        "empty_predictions": sum(not line["prediction"].strip() for line in lines),
        "completion_tokens": sum(line.get("completion_tokens", 0) for line in lines),
    }


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
