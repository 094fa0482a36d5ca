"""Token rows of a cache file: a row is a few numbers in memory, and its tokens stay on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qwen_ds.data.batches import Part
from qwen_ds.data.read.sources import iter_conversations
from qwen_ds.data.rows.cache import make_or_find
from qwen_ds.data.rows.data_report import total
from qwen_ds.data.rows.encode import EncodeOptions
from qwen_ds.data.rows.lengths import length_histogram
from qwen_ds.data.rows.reading import read_options
from qwen_ds.data.rows.row_file import RowFile
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.tokenizer import Encoding
from qwen_ds.recipe.options import DataOptions


class TokenRows:
    """Token rows of one cache file, or some of them, in the order of the sources.

    Attributes:
        lens: int32 [rows], tokens of each row.
        learnt: int32 [rows], target tokens of each row, counted after the shift by one.
        parts: the data sets in order, and how often an epoch draws each of their rows.
        pad_id: <|endoftext|>.
        sha256: of the rows' content and, for some rows of a cache, of their choice: equal means
            equal rows in equal order.
        report: what became of all source rows of the cache, for data_report.json.
    """

    def __init__(
        self, file: RowFile, weights: Sequence[float] | None, chosen: np.ndarray | None = None
    ) -> None:
        self._file, self._chosen = file, chosen
        self._weights = list(weights or [1.0] * len(file.about["data_sets"]))
        assert len(self._weights) == len(file.about["data_sets"])
        self.lens = self._of_these(file.lengths())
        self.learnt = self._of_these(file.column("num_targets"))
        self.pad_id: int = file.about["pad_id"]

    def __len__(self) -> int:
        return len(self.lens)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of a row, int32 [lens[row]] each; copies, which the caller may change."""
        found, runs = self._file.row(self._at(row))
        ids = found.copy()
        labels = np.full_like(ids, IGNORE)
        for begin, end in runs.tolist():
            labels[begin:end] = ids[begin:end]
        return ids, labels

    def source(self, row: int) -> str:
        """Where a row comes from, "file:line"."""
        return self._file.source(self._at(row))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        part = self._of_these(self._file.column("part"))
        counts = np.bincount(part, minlength=len(self._weights)).tolist()
        return tuple(map(Part, counts, self._weights))

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(self._file.about["sha256"].encode())
        if self._chosen is not None:
            digest.update(self._chosen.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def report(self) -> dict[str, Any]:
        about = self._file.about
        data_sets = [
            {**found, "weight": part.weight, "rows": part.rows}
            for found, part in zip(about["data_sets"], self.parts, strict=True)
        ]
        summed = total(about["data_sets"])
        return {
            "rows": len(self),
            "lengths": length_histogram(self.lens, self.learnt),
            "answers_cut": summed["truncated"].get("answer cut", {"rows": 0})["rows"],
            "total": summed,
            "data_sets": data_sets,
            "duplicates": about["duplicates"],
            "options": about["options"],
            "vocabulary_sha256": about["vocabulary_sha256"],
            "sha256": self.sha256,
            "cache": str(self._file.path),
        }

    def split(self, fraction: float, seed: int = 0) -> tuple[TokenRows, TokenRows]:
        """Return (the rest, about `fraction` of the rows).

        Rows with the same first user text stay on the same side, so that no evaluated question was
        trained on. The side depends on that text and the seed, so adding rows moves few others.
        UserError if nothing would be left to train on.
        """
        prompts = self._of_these(self._file.column("prompt_hash")) ^ np.uint64(seed)
        # splitmix64's finaliser: neighbouring seeds must give unrelated orders.
        mixed = (prompts ^ (prompts >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        wanted = max(1, round(fraction * len(self)))
        aside = mixed <= np.partition(mixed, wanted - 1)[wanted - 1]
        if aside.all():
            raise UserError(
                f"data.eval_fraction {fraction} leaves none of the {len(self)} rows to train on "
                "(rows with the same first user text stay together); expected more rows, or "
                "data.eval"
            )
        every = np.arange(len(self)) if self._chosen is None else self._chosen
        rest, set_aside = (
            TokenRows(self._file, self._weights, every[side]) for side in (~aside, aside)
        )
        return rest, set_aside

    def _at(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return row if self._chosen is None else int(self._chosen[row])

    def _of_these(self, column: np.ndarray) -> np.ndarray:
        return column if self._chosen is None else column[self._chosen]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows to train on, and rows for the evaluation loss if the recipe asks for any."""

    train: TokenRows
    eval: TokenRows | None


def prepare(
    data: DataOptions,
    encoding: Encoding,
    seq_length: int | None,
    seed: int = 0,
    every_byte: bool = True,
) -> Prepared:
    """Make or open the token rows of data.train, and of data.eval or a share of data.train.

    Any number of processes may call this at once, see `make_or_find`. The model's `seq_length`
    bounds the rows if data.max_tokens is unset (None: no bound), and the seed decides which rows
    data.eval_fraction sets aside. Without `every_byte` the checksum of cached rows is taken on
    trust. UserError: see `check_data` and `PartReport.check`.
    """
    check_data(data)
    options = encode_options(data, seq_length)

    def rows(paths: Sequence[str], weights: Sequence[float] | None = None) -> TokenRows:
        return TokenRows(RowFile(make_or_find(data, paths, encoding, options, every_byte)), weights)

    train = rows(data.train, data.weights)
    if data.eval:
        return Prepared(train, rows(data.eval))
    if data.eval_fraction:
        return Prepared(*train.split(data.eval_fraction, seed))
    return Prepared(train, None)


def encode_options(data: DataOptions, seq_length: int | None) -> EncodeOptions:
    """EncodeOptions of a recipe: data.max_tokens defaults to the model's seq_length."""
    return EncodeOptions(
        learn_on=data.learn_on,
        max_prompt_tokens=data.max_prompt_tokens,
        max_answer_tokens=data.max_answer_tokens,
        max_tokens=seq_length if data.max_tokens is None else data.max_tokens,
        parse_specials=data.special_tokens_in_text == "parse",
        system=data.system,
    )


def check_data(data: DataOptions) -> None:
    """Check everything about data.* that can be checked without reading a row.

    A UserError names the first mistake: paths, formats, columns, options that exclude each other.
    """
    if not data.train:
        raise UserError("data.train is empty; expected one or more files, folders or hub data sets")
    if data.weights is not None and len(data.weights) != len(data.train):
        raise UserError(
            f"data.weights has {len(data.weights)} numbers and data.train {len(data.train)} "
            "entries; expected one number for each"
        )
    if data.eval and data.eval_fraction:
        raise UserError("data.eval and data.eval_fraction are both given; expected one of them")
    iter_conversations([*data.train, *data.eval], read_options(data))
