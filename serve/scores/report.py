"""Evaluation: predict, unless predictions are given; score; report as JSON and on the terminal."""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qwen_ds import dist
from qwen_ds.disk.place import output_file
from qwen_ds.disk.write import write_json
from qwen_ds.terminal import show
from serve.files.parts import held_output, remove_parts
from serve.options import EvaluateOptions
from serve.scores import gate, words
from serve.scores.answers import answered
from serve.scores.comparison import comparison_of
from serve.scores.outputs import check_last, check_side, last_file_of, unfinished, write_side
from serve.scores.scored import Scored, score
from serve.scores.sections import (
    check_sections,
    finish_sections,
    further_sections,
    section_values,
    sections_in_words,
)
from serve.scores.sides import Side, is_comparison, sides_of
from serve.scores.training import TrainingAnswers


def evaluate(options: EvaluateOptions) -> dict[str, Any] | None:
    """Predict (unless there are predictions), score, and write the reports.

    Returns the content of metrics.json on rank 0, or of comparison.json where several sides are
    compared; None on the others. How the figures of `require` were met stands under "gate".
    UserError: nothing to score, an answer missing in the data, an output that exists or that
    another process writes.
    """
    last_file = last_file_of(options)
    with ExitStack() as held:
        if dist.rank() == 0:
            held.enter_context(held_output(last_file))
        return _evaluate(options, last_file)


def _evaluate(options: EvaluateOptions, last_file: Path) -> dict[str, Any] | None:
    if dist.rank() == 0:
        check_last(last_file, options)
    sides = sides_of(options)
    if dist.rank() == 0:
        check_sections(sides, options)
    requirements = gate.requirements_of(options, [side.name for side in sides])
    for side in sides:
        output_file(side.predictions)
        if dist.rank() == 0:
            check_side(side, last_file)
    if not options.data and not options.predictions:
        return _without_answers(sides, options, requirements, last_file)
    training: Container[str] | None = None
    if options.training and dist.rank() == 0:
        training = TrainingAnswers(options)
    found = answered(sides, last_file)
    if found is None:
        return None
    scored = [score(side, lines, figures, training) for side, lines, figures in found]
    with unfinished(last_file.parent):
        report = _reported(options, scored, requirements, last_file)
    for side in sides:
        if side.given is None:
            remove_parts(output_file(side.predictions))
    finish_sections(sides)
    show(f"\nscores: {last_file}")
    return report


def _without_answers(
    sides: Sequence[Side],
    options: EvaluateOptions,
    requirements: Sequence[gate.Requirement],
    last_file: Path,
) -> dict[str, Any] | None:
    """An evaluation of further sections alone."""
    if dist.rank() != 0:
        return None
    sections = further_sections(sides, [], options)
    verdicts = gate.judged(requirements, section_values(sections))
    report = {"models": [side.name for side in sides], "gate": verdicts} | sections
    _end(report, [], is_comparison(options), last_file)
    finish_sections(sides)
    show(f"\nscores: {last_file}")
    return report


def _reported(
    options: EvaluateOptions,
    scored: Sequence[Scored],
    requirements: Sequence[gate.Requirement],
    last_file: Path,
) -> dict[str, Any]:
    """Write all files of scores and show them; returns the content of the last."""
    several = is_comparison(options)
    reports = [write_side(each, is_last=not several) for each in scored]
    sides, answers = [each.side for each in scored], [each.lines for each in scored]
    sections = further_sections(sides, answers, options)
    further = section_values(sections)
    values = {each.side.name: each.values | further.get(each.side.name, {}) for each in scored}
    rest = {"gate": gate.judged(requirements, values)} | sections
    if several:
        report = comparison_of(scored) | rest
        shown = words.comparison_in_words(report)
    else:
        report = reports[0] | rest
        shown = words.side_in_words(scored[0], report)
    _end(report, [shown], several, last_file)
    return report


def _end(report: dict[str, Any], shown: list[str], several: bool, last_file: Path) -> None:
    """Show a report and write it."""
    verdicts = gate.in_words(report["gate"], several)
    show("\n".join([*shown, *sections_in_words(report), *verdicts]))
    write_json(last_file, report)
