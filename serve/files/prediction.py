"""Prediction over files, by one rank or many: every input row gives one line of the output."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_ds import dist
from qwen_ds.data.read.places import locate
from qwen_ds.decode.exceptions import DecodingError, LogitsNotFinite, RowOutOfMemory
from qwen_ds.disk.lock import Holder
from qwen_ds.disk.place import output_file, refuse_input
from qwen_ds.runlog import say
from serve.answering import Answer, Question
from serve.endpoint.options import given_options
from serve.files import parts as files
from serve.files.claims import Claims
from serve.files.line_writer import LineWriter
from serve.files.parts import PredictionParts, Settings
from serve.files.prompts import PromptReader, PromptRow, References
from serve.files.ranks import RankWatch, SignOfLife, process_of
from serve.files.sources import Source, file_card, find_source, settings_of_source
from serve.options import AnswerOptions

_SETTINGS = (
    "do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "dtype", "long_prompts",
    "limit", "format", "columns", "system", "encoding", "special_tokens_in_text",
)  # fmt: skip
# Options of later releases: absent where they have their defaults, as in folders of earlier ones.
_LATER_SETTINGS = (
    "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "min_tokens", "ignore_eos", "stop", "logprobs", "num_beams", "references",
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
    failed: int  # rows with an error in place of an answer
    seconds: float


def predict(
    model: str | None,
    paths: Sequence[str],
    output: Path,
    options: AnswerOptions,
    references: References = "kept",
    keeps_parts: bool = False,
) -> PredictionFigures | None:
    """Answer every row of `paths` into `output`: ranks take rows as they have room, rank 0 joins.

    Returns figures on rank 0, once the output is complete; None on other ranks, once no row is left
    for them. With `keeps_parts` the caller removes the parts of the output: until then the same
    call knows a finished output for its own. UserError: anything wrong with model, input or output,
    before the first row is answered; or another process writes this output.
    """
    output = output_file(output)
    with ExitStack() as held:
        if dist.rank() == 0:
            held.enter_context(files.held_output(output))
            files.check_output(output, options.overwrite)
        else:
            held.enter_context(files.made_folder(output.parent))
        own = Holder.this_process()
        if dist.world_size() > 1:
            sign = SignOfLife(output, dist.rank(), own)
            held.callback(sign.stop)
        watch = RankWatch(output, dist.world_size(), dist.rank())
        held.callback(watch.stop)
        source = find_source(model, options)
        context = source.context
        reader = PromptReader(paths, options, source.encoding, context, references, source.names)
        settings = settings_of(source, paths, options) | _of_references(references)
        share = _begin(reader, settings, output, watch, own)
        if share is None:
            return None
        held.callback(share.parts.close)
        figures = _run(source, share, options)
        if figures is None:
            return None
        watch.wait_for_ends(share.has_joined)
        if not keeps_parts:
            files.remove_parts(output)
        return figures


class Share:
    """The work of one rank."""

    def __init__(
        self, reader: PromptReader, parts: PredictionParts, claims: Claims, prompts_cut: int
    ) -> None:
        self.parts, self.prompts_cut = parts, prompts_cut
        self._reader, self._claims = reader, claims
        self._block = -1
        self._wanted: frozenset[int] = frozenset()  # rows of the block, if it is ours
        self.has_joined = claims.has_joined
        self.scores_references = reader.references == "scored"

    def rows(self) -> Iterator[PromptRow]:
        """The rows that this rank answers, a block at a time, taken when they are asked for; the
        longest prompts of a block come first. Blocks that a dead process held come last."""
        while True:
            self._block, rows = -1, list[PromptRow]()
            for row in self._reader.rows(self._is_wanted):
                rows.append(row)
                if len(rows) == len(self._wanted):
                    yield from sorted(rows, key=lambda row: -len(row.ids))
                    rows = []
            self.parts.refresh()
            if not any(map(self._is_left, range(self._claims.num_blocks))):
                return

    def _is_wanted(self, row: int) -> bool:
        block = self._claims.block_of(row)
        if block != self._block:
            self._block, self._wanted = block, frozenset()
            if self._is_open(block) and self._claims.take(block):
                rows = self._claims.rows_of(block)
                self._wanted = frozenset(i for i in rows if not self.parts.is_finished(i))
        return row in self._wanted

    def _is_open(self, block: int) -> bool:
        return not all(map(self.parts.is_finished, self._claims.rows_of(block)))

    def _is_left(self, block: int) -> bool:
        return self._is_open(block) and not self._claims.is_held(block)


def _begin(
    reader: PromptReader, settings: Settings, output: Path, watch: RankWatch, own: Holder
) -> Share | None:
    """Make or join the folder of parts; None if all rows are done by then."""
    options, rank, world = reader.options, dist.rank(), dist.world_size()
    old = files.file_state(output) if options.overwrite else None
    used = [file for each in _files_of(settings) for file in each]
    refuse_input(output, [*used, *reader.paths])
    parts: PredictionParts | None
    prompts_cut = 0
    if rank == 0:
        rows, prompts_cut = reader.survey()
        parts = PredictionParts.prepare(output, settings, rows, options.overwrite, world)
    else:
        seconds = options.timeout_minutes * 60
        parts = PredictionParts.join_in(output, settings, rank, seconds, old, watch)
    if parts is None:
        return None

    def alive(other: int) -> Holder | None:
        is_gone = other >= world or other in watch.gone()
        return None if is_gone else process_of(output, other)

    claims = Claims(parts.folder, rank, own, parts.rows, parts.block_rows, alive)
    if rank == 0:
        parts.watch(watch, claims)
    return Share(reader, parts, claims, prompts_cut)


def _run(source: Source, share: Share, options: AnswerOptions) -> PredictionFigures | None:
    """Answer this rank's rows; on rank 0 wait for the others', and join them all."""
    parts, started = share.parts, time.monotonic()
    done_before = parts.refresh()
    if done_before:
        say(f"{parts.folder}: {done_before} of {parts.rows} rows are there from an interrupted run")
    with tqdm(
        total=parts.rows,
        initial=done_before,
        unit="row",
        desc="predict",
        disable=dist.rank() != 0,
        delay=0.1,  # an error while loading gets a line of its own
        mininterval=0.5 if sys.stderr.isatty() else 60.0,  # a log file gets a line a minute
    ) as bar:
        seconds_loading = _answer_share(source, share, options, bar)
        if dist.rank() != 0:
            return None
        parts.wait(options.timeout_minutes * 60, lambda finished: bar.update(finished - bar.n))
    seconds = time.monotonic() - started - seconds_loading
    failed = parts.join()
    rows = parts.rows - done_before
    return PredictionFigures(parts.rows, rows, share.prompts_cut, failed, seconds)


def _answer_share(source: Source, share: Share, options: AnswerOptions, bar: tqdm) -> float:
    """Answer the rows that this rank takes; return the seconds that loading the model took."""
    sampling, asked = options.sampling(), dict[int, PromptRow]()
    stop, structure, scored = tuple(options.stop), source.structure, share.scores_references

    def questions() -> Iterator[Question]:
        for number, row in enumerate(share.rows()):
            asked[number] = row
            own = sampling.of_row(row.id)
            asks = scored and row.reference is not None
            yield Question(
                row.conversation, own, row.ids, row.adapter, stop, structure,
                row.reference if asks else None, row.reference_ids,
            )  # fmt: skip

    coming = questions()
    if (first := next(coming, None)) is None:  # without anything to do no model is loaded
        return 0.0
    started = time.monotonic()
    answerer = source.open()
    began, tokens = time.monotonic(), 0
    with LineWriter(share.parts, bar.update) as writer:
        for number, found in answerer.answer(chain([first], coming)):
            writer.write(line_of(asked.pop(number), found))
            tokens += (found.completion_tokens or 0) if isinstance(found, Answer) else 0
            speed = tokens / max(time.monotonic() - began, 1e-9)  # of this rank
            bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
    return began - started


def line_of(row: PromptRow, found: Answer | DecodingError) -> dict[str, Any]:
    """The line of the output file."""
    line: dict[str, Any] = {"id": row.id, **row.own, "source": row.source, "prompt": row.prompt}
    several = {"references": list(row.references)} if len(row.references) > 1 else {}
    if isinstance(found, DecodingError):
        why = _IN_OPTIONS.get(type(found), "{}").format(found)
        failed = {"finish_reason": "error", "error": why}
        return line | {"prediction": "", "reference": row.reference} | several | failed
    line |= {
        "prediction": found.text,
        "reference": row.reference,
        **several,
        "finish_reason": found.finish_reason,
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
    }
    line |= {"logprobs": found.logprobs} if found.logprobs is not None else {}
    if found.reference_nll is not None:
        line |= {"reference_nll": found.reference_nll, "reference_tokens": found.reference_tokens}
    return line | {"prompt_tokens_cut": row.tokens_cut} if row.tokens_cut else line


def settings_of(source: Source, paths: Sequence[str], options: AnswerOptions) -> Settings:
    """Everything that an answer depends on: options, and files by path, size and time of change."""
    values: dict[str, Any] = {name: vars(options)[name] for name in _SETTINGS}
    values["keep"] = list(options.keep) or None
    given = given_options(options)
    values |= {name: vars(options)[name] for name in _LATER_SETTINGS if name in given}
    if options.logit_bias:  # JSON has no numbers for names
        values["logit_bias"] = {str(token): bias for token, bias in options.logit_bias.items()}
    values |= settings_of_source(source)
    values["input"] = [[str(p), [file_card(f) for f in locate(p).files]] for p in paths]
    return values


def _of_references(references: References) -> Settings:
    """Settings beyond `settings_of`; none in the folders of earlier releases."""
    return {"reference_losses": True} if references == "scored" else {}


def _files_of(settings: Settings) -> Iterator[list[str]]:
    """The names of all files that answers depend on."""
    inputs = (cards for _, cards in settings["input"])
    adapters = (settings.get("adapters") or {}).values()
    for cards in (settings.get("model") or [], settings.get("adapter") or [], *adapters, *inputs):
        yield [name for name, _, _ in cards]
