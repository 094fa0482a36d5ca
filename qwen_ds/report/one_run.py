"""report.html: one page on one run, with everything on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jinja2

from qwen_ds.disk.write import write_text
from qwen_ds.page.html import environment
from qwen_ds.report import sections, training_charts
from qwen_ds.report.answers import count_prompts, ranked, sampled
from qwen_ds.report.evaluations import find, is_better, tables
from qwen_ds.report.folder import RunFiles
from qwen_ds.report.further import further
from qwen_ds.report.further import sentences as further_sentences
from qwen_ds.report.recipe_table import from_defaults
from qwen_ds.report.shading import SHADES, shaded
from qwen_ds.report.verdict import p_value, percent, short, verdict, worst

PAGE = "report.html"


def write_page(run: RunFiles, output: Path) -> None:
    """Write the page of a run, complete or absent. `run.troubles` then has a line for everything
    that is broken in its folder; the page has them, too."""
    write_text(output, page_of(run))


def page_of(run: RunFiles) -> str:
    """The page as HTML."""
    guarded, listed = run.reader.guarded, run.reader.listed
    evaluations = find(run)
    found = listed("the evaluations", lambda: tables(run, evaluations))
    more = [listed("the evaluations", partial(further, table)) for table in found]
    sentences = [*verdict(run, found), *(s for each in more for s in further_sentences(each))]
    values: dict[str, object] = {
        "run": run,
        "severity": worst(sentences),
        "sentences": sentences,
        "cards": sections.cards(run),
        "charts": listed("metrics.jsonl", lambda: training_charts.of_one_run(run)),
        "data": sections.data_page(run),
        "samples": listed("samples.jsonl", lambda: sampled(run.samples)),
        "num_prompts": guarded("samples.jsonl", lambda: count_prompts(run.samples), 0),
        "shaded": listed("token_losses.jsonl", lambda: shaded(run.token_losses)),
        "shades": SHADES,
        "tables": list(zip(found, more, strict=True)),
        "ranked": [(e, listed(e.place, partial(ranked, e))) for e in evaluations],
        "environment": listed("environment.json", lambda: sections.environment(run)),
        "started_as": guarded("environment.json", lambda: sections.started_as(run), ""),
        "repeated_by": sections.repeated_by(run),
        "differing": listed("recipe.yaml", lambda: from_defaults(run.recipe)),
        "recipe": listed("recipe.yaml", lambda: sections.recipe_rows(run.recipe)),
        "deepspeed": listed("ds_config.json", lambda: sections.recipe_rows(run.deepspeed)),
    }
    # Last: what else was found broken by now is on the page, too.
    return templates().get_template("run.html.j2").render(**values, troubles=run.troubles)


def templates() -> jinja2.Environment:
    """The templates of this package, with its own words for figures."""
    found = environment(__package__)
    found.filters |= {"percent": percent, "short": short, "p_value": p_value}
    found.globals["is_better"] = is_better
    return found
