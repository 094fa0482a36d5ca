"""Sections of a run's page as plain tables: the data, the environment, the commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from qwen_ds.page.charts import histogram
from qwen_ds.page.html import duration, figure
from qwen_ds.report.folder import Row, RunFiles, flat, number, series
from qwen_ds.report.recipe_table import spelled
from qwen_ds.report.verdict import SEVERITIES, speed

FATES = {"dropped": "dropped", "skipped": "not readable", "truncated": "cut"}
MAX_REASONS = 12


class DataSet(NamedTuple):
    """One entry of data.train or data.eval."""

    use: str  # training or evaluation
    path: str
    read: int
    kept: int
    tokens: int
    targets: int
    longest: int


class Fate(NamedTuple):
    """Rows that were not taken as they are, by one reason."""

    use: str
    fate: str
    reason: str
    rows: int
    share: float
    first: str


class DataPage(NamedTuple):
    """Everything on the rows that a run was trained and evaluated on."""

    sets: list[DataSet]
    fates: list[Fate]
    notes: list[str]
    charts: list[Markup]
    findings: list[Row]


def data_page(run: RunFiles) -> DataPage:
    """The section on the data; its parts are empty where data_report.json says nothing."""
    report = run.data
    listed = run.reader.listed
    uses = [("training", report)]
    if isinstance(report.get("eval"), dict):
        uses.append(("evaluation", report["eval"]))
    name = "data_report.json"
    sets: list[DataSet] = []
    fates: list[Fate] = []
    charts: list[Markup] = []
    for use, part in uses:
        sets += listed(name, partial(_sets, use, part))
        fates += listed(name, partial(_fates, use, part))
        charts += listed(name, partial(_histograms, use, part))
    notes = listed(name, lambda: _notes(report))
    findings = listed(name, lambda: ordered(report.get("findings") or []))
    return DataPage(sets, fates, notes, charts, findings)


def _sets(use: str, report: Row) -> list[DataSet]:
    return [
        DataSet(
            use,
            Path(str(part["path"])).name,
            part["read"],
            part["kept"],
            part["tokens"],
            part["learnt_tokens"],
            part["longest_tokens"],
        )
        for part in report.get("data_sets") or []
    ]


def _fates(use: str, report: Row) -> list[Fate]:
    total = report.get("total")
    if not isinstance(total, dict):
        return []
    found = [
        Fate(use, word, reason, tally["rows"], tally["rows"] / total["read"], tally["first"])
        for key, word in FATES.items()
        for reason, tally in total[key].items()
    ]
    return sorted(found, key=lambda fate: -fate.rows)[:MAX_REASONS]


def _histograms(use: str, report: Row) -> list[Markup]:
    lengths = report.get("lengths")
    if not isinstance(lengths, dict):
        return []
    options = report.get("options") or {}
    cut = (report.get("total") or {}).get("truncated") or {}
    bounds = {
        "rows": ("max_tokens", "oldest turns dropped"),
        "targets": ("max_answer_tokens", "answer cut"),
    }
    titles = {"rows": "tokens per row", "targets": "target tokens per row"}
    charts = []
    for key, title in titles.items():
        option, reason = bounds[key]
        bound = number(options, option)
        # A bound that cut nothing says nothing about the rows.
        marks = {f"data.{option}": bound} if bound is not None and reason in cut else {}
        charts.append(histogram(lengths["edges"], lengths[key], f"{title}, {use}", marks))
    return [chart for chart in charts if chart]


def _notes(report: Row) -> list[str]:
    total = report.get("total") or {}
    notes = [f"{file}: read as {encoding}" for file, encoding in total.get("encodings", {}).items()]
    notes += [f"{file}: not read, {why}" for file, why in total.get("left_out", {}).items()]
    if report.get("duplicates"):
        notes.append(f"{report['duplicates']:,} rows repeat an earlier one")
    if total.get("longest"):
        notes.append(f"The longest row is {total['longest']}: {total['longest_tokens']:,} tokens")
    return notes


def ordered(findings: Sequence[Row]) -> list[Row]:
    """The doctor's findings, the gravest first. KeyError: one lacks what the page shows."""
    return sorted(
        (
            {
                "finding": str(each["finding"]),
                "severity": each["severity"],
                "count": int(each["count"]),
                "share": float(each["share"]),
                "advice": str(each.get("advice") or ""),
                "examples": [
                    {
                        key: str(example.get(key, ""))
                        for key in ("place", "before", "marked", "after")
                    }
                    for example in each.get("examples") or []
                ][:3],
            }
            for each in findings
        ),
        key=lambda each: (-SEVERITIES.index(each["severity"]), -each["count"]),
    )


def cards(run: RunFiles) -> list[tuple[str, str]]:
    """Figures for the top of the page: value, name."""
    last = run.steps[-1] if run.steps else {}
    best = min(series(run.evals, "eval_loss")[1], default=None)
    seconds = number(run.outcome, "seconds") or sum(series(run.steps, "seconds")[1])
    trained = number(run.environment, "trainable_parameters")
    memory = max(series(run.steps, "memory_gb")[1], default=None)
    found = [
        (number(last, "step"), "optimizer steps", figure),
        (seconds or None, "time, all starts", duration),
        (best, "best evaluation loss", figure),
        (number(last, "loss"), "last training loss", figure),
        (speed(run), "tokens per second", lambda v: f"{v:,.0f}"),
        (memory, "peak memory of rank 0", lambda v: f"{v:,.1f} GB"),
        (trained, "trainable parameters", millions),
    ]
    return [(of(value), name) for value, name, of in found if value is not None]


def millions(parameters: float) -> str:
    if parameters >= 1e9:
        return f"{parameters / 1e9:.3g} B"
    return f"{parameters / 1e6:.3g} M" if parameters >= 1e6 else f"{parameters:,.0f}"


def environment(run: RunFiles) -> list[tuple[str, str]]:
    """Name and value of everything in environment.json but the command."""
    rows = flat({k: v for k, v in run.environment.items() if k != "command"})
    return [(key.replace("_", " "), _plain(value)) for key, value in rows.items()]


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "none" if value is None else spelled(value)


def started_as(run: RunFiles) -> str:
    """The command that began or last resumed the run, without the launcher's own option."""
    words = [str(word) for word in run.environment.get("command") or []]
    return shlex.join(w for w in words if not w.startswith(("--local_rank", "--local-rank")))


def repeated_by(run: RunFiles) -> str:
    """The command that repeats the run with as many ranks; "" without a recipe or environment."""
    ranks = number(run.environment, "ranks")
    if not run.recipe or ranks is None:
        return ""
    asked = run.recipe.get("output_dir")
    folder = asked if isinstance(asked, str) and asked else str(run.folder)
    launcher = ["python"] if ranks == 1 else ["deepspeed", "--num_gpus", str(int(ranks))]
    words = [*launcher, "launch/train.py", "--config", f"{folder}/recipe.yaml"]
    return shlex.join([*words, "--output_dir", f"{folder.rstrip('/')}-again"])


def recipe_rows(recipe: Row) -> list[tuple[str, str]]:
    return [(key, spelled(value)) for key, value in flat(recipe).items()]
