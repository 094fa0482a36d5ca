"""Prompts from the rows of input files: read, encoded, and fitted into the model's context."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from qwen_ds.data.read.dialogue import Dropped
from qwen_ds.data.read.limits import FileOptions
from qwen_ds.data.read.sources import NotRead, ReadOptions, iter_prompts
from qwen_ds.data.rows.data_report import not_read_line
from qwen_ds.decode.exceptions import UnknownAdapter
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, encode_prompt, footer_ids, header_ids, text_ids
from qwen_ds.model.tokenizer import Encoding
from qwen_ds.runlog import say
from qwen_ds.terminal import show
from serve.engine.adapters import DEFAULT
from serve.files.references import references_of, require_columns
from serve.options import AnswerOptions

References = Literal["kept", "needed", "scored"]
"""Whether rows may lack an answer of their own, or not; and whether its loss is wanted, too."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One input row, ready to be answered."""

    id: int
    source: str
    prompt: str
    reference: str | None
    conversation: Conversation
    ids: tuple[int, ...]  # none where a server encodes the prompt
    tokens_cut: int
    own: dict[str, Any]
    """What goes with the row into the output: its own id, the columns of --keep, its adapter."""
    adapter: str | None = None  # that the row names
    references: tuple[str, ...] = ()
    """All answers of the row to compare with, where columns for them are named."""
    reference_ids: tuple[int, ...] = ()
    """The first reference and the token that ends it, where its loss is wanted."""


def _every(row_id: int) -> bool:
    return True


class PromptReader:
    """The rows of the input files; every iteration reads them anew.

    `context` is the number of tokens that prompt and answer may have together. Without an
    `encoding` no token is counted: a server does that. `adapters` are those that rows may name;
    without any their column is not looked at. UserError if max_new_tokens fill the context; while
    iterating, for a row that cannot be answered, or, unless references are just "kept", that has no
    answer of its own.
    """

    def __init__(
        self,
        paths: Sequence[str],
        options: AnswerOptions,
        encoding: Encoding | None,
        context: int,
        references: References = "kept",
        adapters: Collection[str] = (),
    ) -> None:
        self.paths, self.options, self.encoding = paths, options, encoding
        self.context, self.references, self.adapters = context, references, adapters
        self.room = context - options.max_new_tokens
        self._columns: set[str] = set()  # of --references, that rows have
        if encoding is None:
            return
        self.tail = len(footer_ids(encoding)) + len(header_ids(encoding, "assistant"))
        if self.room <= self.tail:
            raise UserError(
                f"max_new_tokens is {options.max_new_tokens}; expected room for a prompt in the "
                f"context of {context}"
            )

    def __iter__(self) -> Iterator[PromptRow]:
        return self.rows(_every)

    def rows(self, is_wanted: Callable[[int], bool]) -> Iterator[PromptRow]:
        """The rows whose ids are wanted; asked once for each id, in order."""
        return self._rows(self.options.files(), {}, is_wanted)

    def _rows(
        self, files: FileOptions, not_read: NotRead, is_wanted: Callable[[int], bool] = _every
    ) -> Iterator[PromptRow]:
        o = self.options
        reading = ReadOptions(o.format, o.columns, o.system, files=files)
        seen: list[object] = []
        found = iter_prompts(self.paths, reading, not_read, seen, o.references)
        for row_id, (conversation, reference, source) in enumerate(islice(found, o.limit)):
            if not is_wanted(row_id):
                continue
            if isinstance(conversation, Dropped):
                detail = f"; {conversation.detail}" if conversation.detail else ""
                raise UserError(
                    f"{source}: {conversation.reason}; expected a question of text alone{detail}"
                )
            references = references_of(reference, seen, o.references, source)
            self._note_columns(seen)
            reference = references[0] if references and o.references else reference
            if self.references != "kept" and not references:
                raise UserError(
                    f"{source}: no answer; expected one to compare with (serve.predict needs none)"
                )
            ids, cut = self._encode(conversation, source)
            question, (own, adapter) = conversation.turns[-1].text, self._own(seen)
            yield PromptRow(
                row_id, source, question, reference, conversation, tuple(ids), cut, own, adapter,
                references if o.references else (), self._reference_ids(reference),
            )  # fmt: skip

    def survey(self) -> tuple[int, int]:
        """Read everything once, so that a mistake in the last row shows before any answer: (rows,
        prompts that are cut). Says, once for each path, which columns are not read."""
        not_read: NotRead = {}
        is_cut: list[bool] = []
        missing, named = dict.fromkeys(self.options.keep), dict.fromkeys(self.adapters)
        names_none = bool(self.adapters)
        for row in self._rows(self.options.files().told_by(say), not_read):
            is_cut.append(row.tokens_cut > 0)
            for name in [name for name in missing if row.own["kept"][name] is not None]:
                del missing[name]
            if row.adapter is not None and self.adapters:
                names_none = False
                if row.adapter not in named:
                    named[row.adapter] = None  # said once
                    say(f"{row.source}: {UnknownAdapter(row.adapter, self.adapters)}")
        column = [self.options.adapter_column] if self.adapters else []
        for counts in not_read.values():
            for name in ("id", *self.options.keep, *column, *self.options.references):  # see _own
                counts.pop(name, None)
        say_not_read(not_read)
        if not is_cut:
            raise UserError(f"{', '.join(map(str, self.paths))}: no rows; expected at least one")
        if missing:
            expected = "expected the name of a column, spelled as in the input"
            raise UserError(f"--keep {next(iter(missing))}: no row has it; {expected}")
        require_columns(self._columns, self.options.references)
        if names_none:
            raise UserError(
                f"no row names its adapter in a column {self.options.adapter_column}; expected one"
                " that does (--adapter_column), or --adapter DIR for all rows"
            )
        return len(is_cut), sum(is_cut)

    def _own(self, seen: Sequence[object]) -> tuple[dict[str, Any], str | None]:
        """A row's own share of the output, and the adapter that it names."""
        row = seen[0] if seen and isinstance(seen[0], dict) else {}
        own = {"row_id": row["id"]} if row.get("id") is not None else {}
        if names := self.options.keep:
            own["kept"] = {name: row.get(name) for name in names}
        if not self.adapters:
            return own, None
        value = row.get(self.options.adapter_column)
        named = None if value in (None, "") else value
        if named is not None and not isinstance(named, str):
            named = json.dumps(named, ensure_ascii=False, default=str)
        own["adapter"] = DEFAULT if named is None and DEFAULT in self.adapters else named
        return own, named

    def _note_columns(self, seen: Sequence[object]) -> None:
        row = seen[0] if seen and isinstance(seen[0], dict) else {}
        self._columns.update(name for name in self.options.references if row.get(name) is not None)

    def _reference_ids(self, reference: str | None) -> tuple[int, ...]:
        if self.encoding is None or self.references != "scored" or reference is None:
            return ()
        parse_specials = self.options.special_tokens_in_text == "parse"
        ids = text_ids(self.encoding, reference, parse_specials)
        return (*ids, self.encoding.im_end_id)

    def _encode(self, conversation: Conversation, source: str) -> tuple[list[int], int]:
        """Ids of the prompt, and the number of tokens that were cut."""
        if self.encoding is None:
            return [], 0
        parse_specials = self.options.special_tokens_in_text == "parse"
        ids = whole = encode_prompt(self.encoding, conversation, parse_specials)
        if len(ids) > self.room and self.options.long_prompts == "stop":
            raise UserError(
                f"{source}: the prompt has {len(ids)} tokens; expected at most {self.room}, the "
                f"model's context of {self.context} less max_new_tokens "
                f"({self.options.max_new_tokens}), or --long_prompts cut"
            )
        while len(ids) > self.room and len(conversation.turns) > 1:
            conversation = replace(conversation, turns=conversation.turns[2:])
            ids = encode_prompt(self.encoding, conversation, parse_specials)
        if len(ids) > self.room:
            # As in the original project: cut the end of the question, but not what must follow it.
            ids = ids[: self.room - self.tail] + ids[-self.tail :]
        return ids, len(whole) - len(ids)


def say_not_read(not_read: NotRead) -> None:
    """Print the columns that hold something and are no part of any prompt, a line for each path.

    On stderr: standard output may hold the answers.
    """
    for path, counts in not_read.items():
        if line := not_read_line(counts, path if len(not_read) > 1 else None):
            show(line, err=True)
