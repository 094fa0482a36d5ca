"""Evaluation: predict, unless predictions are given; score; report as JSON and on the terminal."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from qwen_ds import dist
from qwen_ds.disk.place import output_file, refuse_input, require_folder
from qwen_ds.disk.write import replacing, write_json, write_text
from qwen_ds.runlog import say
from qwen_ds.terminal import show
from serve.engine.loading import free_memory
from serve.files.parts import check_output, held_output, remove_parts
from serve.files.prediction import PredictionFigures, predict
from serve.files.prompts import References
from serve.files.ranks import Leader
from serve.options import EvaluateOptions
from serve.scores import gate, words
from serve.scores.answers import (
    Line,
    TrainingAnswers,
    prediction_lines,
    read_predictions,
    require_same_rows,
)
from serve.scores.candidates import Candidate, candidates_of, is_comparison
from serve.scores.comparison import comparison_of
from serve.scores.scored import ScoredSide, files_of, report_of, score, speed_of
from serve.scores.sections import (
    check_sections,
    finish_sections,
    further_sections,
    sections_in_words,
)

_MARK = ".scores.unfinished"  # while it is there, files of scores are an interrupted run's


def evaluate(options: EvaluateOptions) -> dict[str, Any] | None:
    """Predict (unless there are predictions), score, and write the reports.

    Returns the content of metrics.json on rank 0, or of comparison.json where several sides are
    compared; None on the others. What of `require` is missed stands in its "gate". UserError:
    nothing to score, an answer missing in the data, an output that exists or that another process
    writes.
    """
    folder = Path(options.output_dir)
    last = "comparison.json" if is_comparison(options) else "metrics.json"
    last_file = output_file(folder / last)
    with ExitStack() as held:
        if dist.rank() == 0:
            held.enter_context(held_output(last_file))
        return _evaluate(options, last_file)


def _evaluate(options: EvaluateOptions, last_file: Path) -> dict[str, Any] | None:
    if dist.rank() == 0:
        _check_output(last_file, options)
    sides = candidates_of(options)
    if dist.rank() == 0:
        check_sections(sides, options)
    requirements = gate.requirements_of(options, [side.name for side in sides])
    for side in sides:
        output_file(side.predictions)
        if dist.rank() == 0:
            _check_side(side, options)
    if not options.data and not options.predictions:
        return _without_answers(sides, options, last_file)
    training: Container[str] | None = None
    if options.training and dist.rank() == 0:
        training = TrainingAnswers(options)
    answered = _answered(sides, last_file)
    if answered is None:
        return None
    scored = [score(side, lines, of_run, training) for side, lines, of_run in answered]
    with _unfinished(last_file.parent):
        report = _write(options, scored, requirements, last_file)
    for side in sides:
        if side.given is None:
            remove_parts(output_file(side.predictions))
    finish_sections(sides)
    show(f"\nscores: {last_file}")
    return report


def _without_answers(
    sides: Sequence[Candidate], options: EvaluateOptions, last_file: Path
) -> dict[str, Any] | None:
    """An evaluation of further sections alone."""
    if dist.rank() != 0:
        return None
    sections = further_sections(sides, options)
    report = {"models": [side.name for side in sides], "gate": []} | sections
    show("\n".join(sections_in_words(sections)))
    write_json(last_file, report)
    finish_sections(sides)
    show(f"\nscores: {last_file}")
    return report


def _check_output(last_file: Path, options: EvaluateOptions) -> None:
    given = [file for file in options.predictions]
    refuse_input(last_file, [*given, *options.data])
    if not (last_file.parent / _MARK).exists():
        advice = "a new --output_dir, or --overwrite true to replace it"
        check_output(last_file, options.overwrite, advice)
    require_folder(last_file.parent)


def _check_side(side: Candidate, options: EvaluateOptions) -> None:
    """Refuse outputs of a side that are there, unless an interrupted run has left them."""
    advice = "a new --output_dir, or --overwrite true to replace it"
    if not (Path(options.output_dir) / _MARK).exists():
        for file in files_of(side):
            check_output(output_file(file), options.overwrite, advice)
    if side.given is None:
        advice = (
            "a new --output_dir, --overwrite true to replace it, or --predictions with its name to "
            "score it"
        )
        check_output(output_file(side.predictions), options.overwrite, advice)


def _answered(
    sides: Sequence[Candidate], last_file: Path
) -> list[tuple[Candidate, list[Line], PredictionFigures | None]] | None:
    """Every side with its answers, made one side after another unless they are there; None on all
    ranks but the first."""
    if any(side.given is not None for side in sides):
        if dist.rank() != 0:
            return None
        read = [read_predictions(side.predictions, side.options) for side in sides]
        require_same_rows([side.name for side in sides], read)
        return [(side, lines, None) for side, lines in zip(sides, read, strict=True)]
    made = []
    files = [output_file(side.predictions) for side in sides]
    with Leader(last_file, files) as leader:
        for side, file in zip(sides, files, strict=True):
            if len(sides) > 1:
                say(f"{side.name}:")
            leader.wait_for(file)
            options = side.options
            references: References = "scored" if options.perplexity else "needed"
            figures = predict(
                options.model, options.data, file, options, references, keeps_parts=True
            )
            made.append((side, figures))
            free_memory()
    done = [(side, figures) for side, figures in made if figures is not None]
    if dist.rank() != 0:
        return None
    return [(side, list(prediction_lines(side.predictions)), figures) for side, figures in done]


@contextmanager
def _unfinished(folder: Path) -> Iterator[None]:
    """Mark a folder until all files of scores are in it."""
    mark = folder / _MARK
    write_text(mark, "")
    yield
    mark.unlink()


def _write(
    options: EvaluateOptions,
    scored: Sequence[ScoredSide],
    requirements: Sequence[gate.Requirement],
    last_file: Path,
) -> dict[str, Any]:
    """Write all files of scores and show them; returns the content of the last."""
    verdicts = gate.judged(requirements, {side.candidate.name: side.values for side in scored})
    several = is_comparison(options)
    reports = [_write_side(side, several) for side in scored]
    sections = further_sections([side.candidate for side in scored], options)
    if several:
        report = comparison_of(scored) | {"gate": verdicts} | sections
        shown = words.comparison_in_words(report)
    else:
        report = reports[0] | {"gate": verdicts} | sections
        shown = words.side_in_words(scored[0], report)
    show("\n".join([shown, *sections_in_words(sections), *gate.in_words(verdicts, several)]))
    write_json(last_file, report)
    return report


def _write_side(side: ScoredSide, several: bool) -> dict[str, Any]:
    """Write a side's files; metrics.json only where it is not the last file of all."""
    report = report_of(side)
    rows_file, speed_file, report_file = map(output_file, files_of(side.candidate))
    require_folder(rows_file.parent, make=True)
    with replacing(rows_file) as unfinished, unfinished.open("w", encoding="utf-8") as out:
        out.writelines(f"{line}\n" for line in side.row_lines())
    if side.figures is not None:
        write_json(speed_file, speed_of(side))
    if several:
        write_json(report_file, report)
    return report
