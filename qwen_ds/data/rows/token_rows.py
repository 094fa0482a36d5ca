"""Token rows, memory-mapped from the cache: in memory each row is a few numbers, its tokens stay on disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qwen_ds.data.batches import Part
from qwen_ds.data.rows.cache import make_or_find
from qwen_ds.data.rows.data_report import total
from qwen_ds.data.rows.encode import EncodeOptions
from qwen_ds.data.rows.writer import IDS_FILE, ROW, ROWS_FILE, RUNS_FILE, read_meta
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.recipe.options import DataOptions


class TokenRows:
    """Token rows of one cache folder, or some of them; memory-mapped, read-only, in the order of the sources.

    Attributes:
        lens: int32 [rows], tokens of each row.
        learnt: int32 [rows], labels of each row that count (those left after the shift by one).
        parts: the data sets in order, with their weights: how often an epoch draws each of their rows.
        pad_id: <|endoftext|>.
        sha256: of the rows' content and, of a part of a cache, which rows: equal means equal rows in equal order.
        report: what became of the source rows (of the whole cache), for data_report.json.
    """

    def __init__(
        self, folder: Path, weights: Sequence[float] | None = None, chosen: np.ndarray | None = None
    ) -> None:
        self._folder = folder
        self._meta = read_meta(folder)
        self._ids = np.memmap(folder / IDS_FILE, "<i4", "r")
        self._runs = np.memmap(folder / RUNS_FILE, "<i4", "r").reshape(-1, 2)
        self._rows = np.memmap(folder / ROWS_FILE, ROW, "r")
        self._chosen = chosen
        self._weights = list(weights or [1.0] * len(self._meta["data_sets"]))
        assert len(self._weights) == len(self._meta["data_sets"])
        self.lens = self._column("length")
        self.learnt = self._column("learnt")
        self.pad_id: int = self._meta["pad_id"]

    def __len__(self) -> int:
        return len(self.lens)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of a row, int32 [lens[row]] each; copies, yours to change."""
        found = self._rows[self._at(row)]
        start, first_run = int(found["start"]), int(found["first_run"])
        ids = np.array(self._ids[start : start + int(found["length"])], np.int32)
        labels = np.full_like(ids, IGNORE)
        for begin, end in self._runs[first_run : first_run + int(found["n_runs"])].tolist():
            labels[begin:end] = ids[begin:end]
        return ids, labels

    def source(self, row: int) -> str:
        """Where a row comes from, "file:line"."""
        found = self._rows[self._at(row)]
        before, after = self._meta["names"][int(found["name"])]
        number = int(found["number"])
        return f"{before}{number}{after}" if number >= 0 else before + after

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        counts = np.bincount(self._column("part"), minlength=len(self._weights)).tolist()
        return tuple(
            Part(count, weight) for count, weight in zip(counts, self._weights, strict=True)
        )

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(self._meta["sha256"].encode())
        if self._chosen is not None:
            digest.update(self._chosen.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def report(self) -> dict[str, Any]:
        data_sets = [
            {**found, "weight": weight, "rows": part.rows}
            for found, weight, part in zip(
                self._meta["data_sets"], self._weights, self.parts, strict=True
            )
        ]
        summed = total(self._meta["data_sets"])
        return {
            "rows": len(self),
            "answers_cut": summed["truncated"].get("answer cut", {"rows": 0})["rows"],
            "total": summed,
            "data_sets": data_sets,
            "duplicates": self._meta["duplicates"],
            "options": self._meta["options"],
            "vocabulary_sha256": self._meta["vocabulary_sha256"],
            "sha256": self.sha256,
            "cache": str(self._folder),
        }

    def split(self, fraction: float, seed: int = 0) -> tuple[TokenRows, TokenRows]:
        """(the rest, about `fraction` of the rows). Rows with the same first user text stay on the same side, so that
        nothing is evaluated whose question was trained; which side depends on that text and the seed alone, so that
        adding rows moves few others.

        Raises:
            UserError: either side would be empty.
        """
        prompts = self._column("prompt") ^ np.uint64(seed)
        # splitmix64's finaliser: neighbouring seeds must give unrelated orders.
        mixed = (prompts ^ (prompts >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        wanted = max(1, round(fraction * len(self)))
        aside = mixed <= np.partition(mixed, wanted - 1)[wanted - 1]
        if aside.all():
            raise UserError(
                f"data.eval_fraction {fraction} leaves none of the {len(self)} rows to train on "
                "(rows with the same first user text stay together); expected more rows, or data.eval"
            )
        every = np.arange(len(self)) if self._chosen is None else self._chosen
        return tuple(
            TokenRows(self._folder, self._weights, every[side]) for side in (~aside, aside)
        )  # type: ignore

    def _at(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return row if self._chosen is None else int(self._chosen[row])

    def _column(self, name: str) -> np.ndarray:
        whole = self._rows[name]
        return np.ascontiguousarray(whole if self._chosen is None else whole[self._chosen])


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows to train on, and rows for the evaluation loss where the recipe asks for any."""

    train: TokenRows
    eval: TokenRows | None


def prepare(
    data: DataOptions, model_dir: Path, seed: int = 0, n_workers: int | None = None
) -> Prepared:
    """Make or open the token rows of data.train, and of data.eval or a share of data.train.

    Any number of processes may call this at once: the first on a machine makes the rows, the others wait for it.

    Args:
        model_dir: a checkpoint folder (its vocabulary, and its seq_length where data.max_tokens is unset).
        seed: which rows data.eval_fraction sets aside.
        n_workers: processes that encode; None means one per core, 0 none besides this one.

    Raises:
        UserError: whatever is wrong with the options or the rows; see `report.PartReport.check`.
    """
    _check(data)
    options = encode_options(data, model_dir)
    train = TokenRows(make_or_find(data, data.train, model_dir, options, n_workers), data.weights)
    if data.eval:
        return Prepared(
            train, TokenRows(make_or_find(data, data.eval, model_dir, options, n_workers))
        )
    if data.eval_fraction:
        return Prepared(*train.split(data.eval_fraction, seed))
    return Prepared(train, None)


def encode_options(data: DataOptions, model_dir: Path) -> EncodeOptions:
    """How rows are encoded for a model: data.max_tokens defaults to its seq_length."""
    max_tokens = data.max_tokens
    if max_tokens is None:
        max_tokens = QWenConfig.from_pretrained(model_dir).seq_length
    return EncodeOptions(
        learn_on=data.learn_on,
        max_prompt_tokens=data.max_prompt_tokens,
        max_answer_tokens=data.max_answer_tokens,
        max_tokens=max_tokens,
        parse_specials=data.special_tokens_in_text == "parse",
        system=data.system,
    )


def _check(data: DataOptions) -> None:
    if not data.train:
        raise UserError("data.train is empty; expected one or more files, folders or hub data sets")
    if data.weights is not None:
        if len(data.weights) != len(data.train):
            raise UserError(
                f"data.weights has {len(data.weights)} numbers and data.train {len(data.train)} entries; "
                "expected one number for each"
            )
        wrong = [weight for weight in data.weights if not (weight > 0 and math.isfinite(weight))]
        if wrong:
            raise UserError(
                f"data.weights has {wrong[0]}; expected positive numbers (leave a data set out instead)"
            )
    if not 0 <= data.eval_fraction < 1:
        raise UserError(f"data.eval_fraction is {data.eval_fraction}; expected 0 to 1, 1 excluded")
    if data.eval and data.eval_fraction:
        raise UserError("data.eval and data.eval_fraction are both given; expected one of them")


def check_data(data: DataOptions) -> None:
    _check(data)
