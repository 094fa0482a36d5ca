"""The general rows measured by each side of an evaluation: general.jsonl, and what it shows.

A line: id, source, and of a text nll (nats), tokens and bytes; of a question logprobs (by letter),
chosen and answer; or error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.random import default_rng

from qwen_ds.data.read.places import locate
from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.disk.place import output_file, refuse_input
from qwen_ds.errors import UserError
from qwen_ds.runlog import say
from serve.answering import EngineAnswerer
from serve.engine.loading import free_memory
from serve.files.parts import Settings, check_output, remove_parts
from serve.files.sources import ModelSource, Source, file_card, find_source, settings_of_source
from serve.options import EvaluateOptions
from serve.scores.forgetting import Verdict, compare, mean_of
from serve.scores.general_rows import LETTERS, GeneralRow, read_general
from serve.scores.kept_rows import Line, kept_rows
from serve.scores.likelihood import (
    PIECE,
    EndpointScorer,
    EngineScorer,
    PlainText,
    Score,
    Scorer,
    TextScore,
)
from serve.scores.sides import Side

FILE = "general.jsonl"
MEASURES = ("general.perplexity", "general.bits_per_byte", "general.accuracy")
AGAINST_FIRST = ("general.perplexity_rise", "general.accuracy_fall", "general.forgot")
_FORGOT: dict[Verdict, float] = {"no sign": 0.0, "cannot tell": 0.5, "forgot": 1.0}


def check_general(sides: Sequence[Side], options: EvaluateOptions) -> None:
    """Read the general rows once, and look at the outputs, before anything is generated.

    UserError: a row that cannot be measured, no model to measure it, or an output that exists.
    """
    if not options.general:
        if options.general_examples:
            raise UserError("--general_examples is given without --general; expected both")
        return
    if options.predictions:
        raise UserError("--general and --predictions are given; expected models to measure")
    for side in sides:
        if any("=" in one for one in side.options.adapter):
            raise UserError(
                "--general with adapters by name; expected --compare with their folders"
            )
        output = output_file(side.folder / FILE)
        refuse_input(output, [*options.general, *options.general_examples])
        check_output(output, options.overwrite)
    read_general(options.general, options.general_examples, options.files())


def general_section(sides: Sequence[Side], options: EvaluateOptions) -> dict[str, Any]:
    """Measure the rows on every side, and compare the others with the first."""
    rows = read_general(options.general, options.general_examples, options.files())
    measured = {side.name: _measured(side, rows) for side in sides}
    names = list(measured)
    found: dict[str, Any] = {
        "files": options.general,
        "rows": len(rows),
        "scores": {name: summary(lines, options.seed) for name, lines in measured.items()},
    }
    if len(names) > 1:
        first = measured[names[0]]
        found["against"] = names[0]
        found["changes"] = {
            name: compare(first, measured[name], options.seed) for name in names[1:]
        }
    return found


def general_in_words(section: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    out = []
    for name, scores in section["scores"].items():
        told = [
            f"{figure} {value:.4g} ({low:.4g} to {high:.4g})"
            for figure, (value, low, high) in scores.items()
        ]
        out.append(f"general, {name}: {', '.join(told)}")
    for name, change in section.get("changes", {}).items():
        told = [change[kind]["in_words"] for kind in ("texts", "questions") if kind in change]
        out += [f"{name} against {section['against']}: {line}" for line in told]
        if change["failed"]:
            out.append(f"{name}: {change['failed']} general rows failed and are left out")
    return out


def general_values(section: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """MEASURES by side, and AGAINST_FIRST of all sides but the first, as far as they were measured.

    A rise or fall is the worsening of serve.scores.forgetting; general.forgot is 0 for no sign of
    forgetting, 0.5 where that cannot be told, 1 for a model that forgot.
    """
    found = {
        name: {f"general.{figure}": value for figure, (value, _, _) in scores.items()}
        for name, scores in section["scores"].items()
    }
    for name, change in section.get("changes", {}).items():
        for kind, measure in (("texts", "perplexity_rise"), ("questions", "accuracy_fall")):
            if kind in change:
                found[name][f"general.{measure}"] = change[kind]["worsening"]
        found[name]["general.forgot"] = _FORGOT[change["verdict"]]
    return found


def remove_general_parts(sides: Sequence[Side]) -> None:
    """Remove what an interrupted run would need, once the reports are written."""
    for side in sides:
        remove_parts(output_file(side.folder / FILE))


def summary(lines: Sequence[Line], seed: int) -> dict[str, list[float]]:
    """[value, low, high] of perplexity and bits per byte of the texts, and of the accuracy on the
    questions; 95 %."""
    found = {}
    texts = [line for line in lines if line.get("tokens")]
    if texts:
        nll_N, tokens_N, bytes_N = (
            np.array([line[key] for line in texts], dtype=np.float64)
            for key in ("nll", "tokens", "bytes")
        )
        found["perplexity"] = np.exp(mean_of(nll_N, tokens_N, default_rng(seed))).tolist()
        found["bits_per_byte"] = list(mean_of(nll_N / np.log(2), bytes_N, default_rng(seed)))
    questions = [line for line in lines if "chosen" in line]
    if questions:
        right_N = np.array([line["chosen"] == line["answer"] for line in questions], np.float64)
        found["accuracy"] = list(mean_of(right_N, np.ones(len(right_N)), default_rng(seed)))
    return found


def _measured(side: Side, rows: Sequence[GeneralRow]) -> list[Line]:
    """The lines of a side's general.jsonl."""
    options, output = replace(side.options, num_beams=1), output_file(side.folder / FILE)
    source = find_source(options.model, options)
    settings = settings_of_source(source) | _settings(options)

    def make(left: Sequence[int]) -> Iterator[Line]:
        return _lines(source, [rows[i] for i in left])

    say(f"general rows, {side.name}:")
    lines = kept_rows(output, settings, len(rows), make, options.overwrite)
    free_memory()
    return lines


def _settings(options: EvaluateOptions) -> Settings:
    def cards(paths: Sequence[str]) -> list[Any]:
        return [[str(path), [file_card(file) for file in locate(path).files]] for path in paths]

    files = {"general": cards(options.general), "examples": cards(options.general_examples)}
    return files | {"dtype": options.dtype, "encoding": options.encoding, "piece": PIECE}


def scorer_of(source: Source) -> Scorer:
    """The side that tells likelihoods: the model, loaded, or the server."""
    if isinstance(source, ModelSource):
        answerer = source.open()
        assert isinstance(answerer, EngineAnswerer), "likelihoods know no beams"
        return EngineScorer(answerer.decoding, source.folder.encoding)
    return EndpointScorer(source.endpoint)


def _lines(source: Source, rows: Sequence[GeneralRow]) -> Iterator[Line]:
    """Lines of rows as they are measured; without any, no model is loaded."""
    if rows:
        for i, found in scorer_of(source).score([row.item for row in rows]):
            yield line_of(rows[i], found)


def line_of(row: GeneralRow, found: Score | DecodingError) -> Line:
    """The line of general.jsonl."""
    line: Line = {"id": row.id, "source": row.source}
    if isinstance(found, DecodingError):
        return line | {"finish_reason": "error", "error": str(found)}
    if isinstance(found, TextScore):
        assert isinstance(row.item, PlainText), "a question with the score of a text"
        size = len(row.item.text.encode(errors="replace"))
        return line | {"nll": found.nll, "tokens": found.tokens, "bytes": size}
    assert row.answer is not None, "a question without an answer"
    logprobs = dict(zip(LETTERS, found.logprobs, strict=False))
    chosen = max(logprobs, key=lambda letter: logprobs[letter])
    return line | {"logprobs": logprobs, "chosen": chosen, "answer": LETTERS[row.answer]}
