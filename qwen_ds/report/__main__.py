"""Write the page of one run, or compare runs on one page.

    python -m qwen_ds.report RUN [--output FILE]
    python -m qwen_ds.report RUN RUN ... [--output FILE] [--overwrite]

Of one run, its report.html is written anew, so that it takes in evaluations made since. Several are
compared in comparison.html, beside the first, or in the file that --output names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from qwen_ds.disk.place import given_path, output_file, refuse_input, require_folder
from qwen_ds.errors import UserError
from qwen_ds.page.charts import SERIES_COLOURS
from qwen_ds.page.html import count
from qwen_ds.recipe.parser import Parser
from qwen_ds.recipe.ranges import PathText
from qwen_ds.report import one_run, several_runs
from qwen_ds.report.folder import read_run
from qwen_ds.runlog import run_command
from qwen_ds.terminal import show

MAX_RUNS = SERIES_COLOURS


@dataclass(frozen=True)
class ReportOptions:
    """Where the page goes."""

    output: PathText | None = None
    """File to write. Unset: report.html of the one run; of several, comparison.html beside the
    first."""
    overwrite: bool = False
    """Replace a file of that name."""


def parse(argv: Sequence[str] | None = None) -> tuple[list[Path], ReportOptions]:
    """The run folders and the options. UserError: a mistake in them."""
    parser = Parser(prog="python -m qwen_ds.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=str, metavar="RUN", help="folders of runs")
    parser.add_class_arguments(ReportOptions)
    found = parser.parse(argv)
    options = ReportOptions(**{each.name: found[each.name] for each in fields(ReportOptions)})
    runs = [Path(given_path("RUN", text)) for text in found["runs"]]
    if len(runs) > MAX_RUNS:
        raise UserError(f"{len(runs)} runs; expected at most {MAX_RUNS} on one page")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("a run was given twice; expected runs that differ")
    return runs, options


def main() -> int:
    runs, options = parse()
    page, troubles = _one(runs[0], options) if len(runs) == 1 else _several(runs, options)
    for line in troubles:
        show(f"note: {line}", err=True)
    show(f"{page}: {count(len(runs), 'run')}, {page.stat().st_size / 1000:,.0f} kB")
    return 0


def _one(run: Path, options: ReportOptions) -> tuple[Path, list[str]]:
    found = read_run(run)
    own = run / one_run.PAGE
    if options.output is None and not found.is_finished:
        # A report.html marks a finished run; training writes it last.
        raise UserError(
            f"{run}: neither adapter nor model in it; expected a finished run, or --output FILE "
            "for the page of one that is under way"
        )
    page = own if options.output is None else _new_page(options, options.output, [run])
    one_run.write_page(found, page)
    return page, found.troubles


def _several(runs: Sequence[Path], options: ReportOptions) -> tuple[Path, list[str]]:
    found = [read_run(run) for run in runs]
    beside = runs[0].absolute().parent / several_runs.PAGE
    page = _new_page(options, options.output or str(beside), runs)
    several_runs.write_page(found, page)
    return page, several_runs.troubles_of(found)


def _new_page(options: ReportOptions, given: str, runs: Sequence[Path]) -> Path:
    """The file to write. UserError: it exists, cannot be written, or lies in a run's folder."""
    page = output_file(given)
    require_folder(page.parent)
    refuse_input(page, runs)
    if page.exists() and not options.overwrite:
        raise UserError(f"{given}: exists; expected a new file, or --overwrite")
    return page


if __name__ == "__main__":
    run_command(main)
