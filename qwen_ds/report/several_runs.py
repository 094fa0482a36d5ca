"""comparison.html: several runs on one page, each against the first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from qwen_ds.disk.write import write_text
from qwen_ds.report import sections, training_charts
from qwen_ds.report.answers import Changed, changed, sampled_last
from qwen_ds.report.evaluations import Evaluation, find, score_names, verdicts
from qwen_ds.report.folder import Row, RunFiles
from qwen_ds.report.one_run import templates
from qwen_ds.report.recipe_table import between
from qwen_ds.report.significance import Paired
from qwen_ds.report.verdict import Severity, verdict, worst

PAGE = "comparison.html"


class Column(NamedTuple):
    """One run at the top of the page."""

    name: str
    folder: str
    text: str
    severity: Severity
    figures: dict[str, str]


class Compared(NamedTuple):
    """The same evaluation of several runs; verdicts are against the first of them."""

    title: str
    heads: list[str]
    evaluations: list[Evaluation]
    verdicts: list[dict[str, Paired]]
    answers: list[Changed] | None  # empty: all are the same; None: no row is answered by all

    @property
    def names(self) -> list[str]:
        return score_names(self.evaluations)


def write_page(runs: Sequence[RunFiles], output: Path) -> None:
    """Write the page on these runs, complete or absent; troubles as in `one_run.write_page`."""
    write_text(output, page_of(runs))


def page_of(runs: Sequence[RunFiles]) -> str:
    """The page as HTML."""
    names = distinct_names([run.folder for run in runs])
    columns = [_column(run, name) for run, name in zip(runs, names, strict=True)]
    figures = list(dict.fromkeys(key for column in columns for key in column.figures))
    compared = _compared(runs, names)
    values = {
        "names": names,
        "columns": columns,
        "figures": figures,
        "recipe": between([run.recipe for run in runs]),
        "environment": between([_circumstances(run) for run in runs]),
        "charts": runs[0].reader.listed(
            "metrics.jsonl", lambda: training_charts.of_several_runs(runs, names)
        ),
        "compared": compared,
        "samples": [] if compared else _last_samples(runs),
    }
    template = templates().get_template("runs.html.j2")
    return template.render(**values, troubles=troubles_of(runs))


def troubles_of(runs: Sequence[RunFiles]) -> list[str]:
    """The troubles of all runs, each with the name of its run."""
    names = distinct_names([run.folder for run in runs])
    pairs = zip(runs, names, strict=True)
    return [f"{name}: {line}" for run, name in pairs for line in run.troubles]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: A, B, or x/run, y/run."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _column(run: RunFiles, name: str) -> Column:
    sentences = verdict(run)
    text = " ".join(sentence.text for sentence in sentences[:1])
    figures = {label: value for value, label in sections.cards(run)}
    return Column(name, str(run.folder), text, worst(sentences[:1]), figures)


def _circumstances(run: RunFiles) -> Row:
    """Where a run ran and on which rows, without the command, whose options the recipe has."""
    found = {key: value for key, value in run.environment.items() if key != "command"}
    data = {"training rows": run.data.get("rows"), "training rows, sha256": run.data.get("sha256")}
    evaluated = run.data.get("eval")
    if isinstance(evaluated, dict):
        data |= {
            "evaluation rows": evaluated.get("rows"),
            "evaluation rows, sha256": evaluated.get("sha256"),
        }
    return {**found, **{key: value for key, value in data.items() if value is not None}}


def _compared(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Compared]:
    """Evaluations that at least two of the runs have: by the same folder, or on the same data."""
    left = [run.reader.listed("the evaluations", partial(find, run)) for run in runs]
    found = []
    for key in ("folder", "data"):
        groups: dict[tuple[str, ...], dict[int, Evaluation]] = {}
        for number, evaluations in enumerate(left):
            for evaluation in evaluations:  # the newest of one key counts
                place = (evaluation.place, *evaluation.data)
                what = place if key == "folder" else (str(evaluation.is_base), *evaluation.data)
                groups.setdefault(what, {})[number] = evaluation
        for group in groups.values():
            if len(group) > 1:
                found.append(_one_comparison(group, names, runs))
                used = set(map(id, group.values()))
                left = [[e for e in each if id(e) not in used] for each in left]
    return found


def _one_comparison(
    group: dict[int, Evaluation], names: Sequence[str], runs: Sequence[RunFiles]
) -> Compared:
    evaluations = list(group.values())
    places = dict.fromkeys(e.place for e in evaluations)
    data = ", ".join(evaluations[0].data)
    title = f"{' / '.join(places)}{': ' if data else ''}{data}"
    reader = runs[next(iter(group))].reader
    answers = reader.guarded("predictions.jsonl", lambda: changed(evaluations), None)
    return Compared(
        title,
        [f"{names[number]} ({e.model})" for number, e in group.items()],
        evaluations,
        [verdicts(evaluations[0], other) for other in evaluations[1:]],
        answers,
    )


def _last_samples(runs: Sequence[RunFiles]) -> list[Changed]:
    """Where no evaluation is shared: the last sampled answers to the prompts that all runs have."""
    return runs[0].reader.listed(
        "samples.jsonl", lambda: sampled_last([run.samples for run in runs])
    )
