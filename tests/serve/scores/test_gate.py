"""The gate: what must hold, for whom, and what a mistake in it says."""

from __future__ import annotations

import pytest

from qwen_ds.errors import UserError
from serve.options import EvaluateOptions, parse
from serve.scores.gate import in_words, judged, requirements_of


def options_for(*require: str, more: tuple[str, ...] = ()) -> EvaluateOptions:
    return parse(
        EvaluateOptions,
        "",
        ["--output_dir", "out", "--data", "dev.json", "--require", *require, *more],
    )


VALUES = {
    "base": {"stop_rate": 0.5, "seed.rouge-l": 0.1, "perplexity": None},
    "new": {"stop_rate": 0.99, "seed.rouge-l": 0.3, "perplexity": None},
    "newer": {"stop_rate": 1.0, "seed.rouge-l": 0.2, "perplexity": 2.0},
}


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("stop_rate>=0.99", [("new", True), ("newer", True)]),
        ("stop_rate > 0.99", [("new", False), ("newer", True)]),
        ("seed.rouge-l<=2e-1", [("new", False), ("newer", True)]),
        ("seed.rouge-l<0.2", [("new", False), ("newer", False)]),
        ("base:stop_rate>=0.99", [("base", False)]),
        ("base: seed.rouge-l >= 0.1", [("base", True)]),
        ("perplexity<3", [("new", False), ("newer", True)]),  # one was not measured
    ],
)
def test_all_but_the_first_side_must_hold_what_names_none(
    text: str, met: list[tuple[str, bool]]
) -> None:
    found = judged(requirements_of(options_for(text), list(VALUES)), VALUES)
    assert [(one["model"], one["met"]) for one in found] == met
    assert {one["require"] for one in found} == {text}


def test_a_single_side_must_hold_all() -> None:
    requirements = requirements_of(options_for("stop_rate>=0.99", "seed.rouge-l>0"), ["base"])
    found = judged(requirements, VALUES)
    assert [(one["model"], one["value"], one["met"]) for one in found] == [
        ("base", 0.5, False),
        ("base", 0.1, True),
    ]
    assert in_words(found, False) == [
        "required  MISSED  stop_rate>=0.99  (0.5000)",
        "required  holds   seed.rouge-l>0  (0.1000)",
    ]
    (missing,) = judged(requirements_of(options_for("base:perplexity<3"), list(VALUES)), VALUES)
    assert in_words([missing], True) == [
        "required  MISSED  base: base:perplexity<3  (not measured)"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed.rouge-L>=0.2", r"no measure is named seed\.rouge-L; expected one such as seed"),
        ("stop_rate", "'stop_rate': not a requirement; expected a measure, one of >=, >"),
        ("stop_rate==1", "not a requirement"),
        ("stop_rate>=nan", "not a requirement"),
        ("stop_rate>=high", "not a requirement"),
        ("other:stop_rate>=1", "no side is named other; expected one of base, new, newer"),
        ("verbatim_share<=0.1", "verbatim_share is measured with --training alone"),
        ("general.accuracy>=0.3", "general.accuracy is measured with --general alone"),
        ("judge.win_rate>=0.5", "judge.win_rate is measured with --judge alone"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        requirements_of(options_for(text), list(VALUES))
    assert "\n" not in str(error.value)


def test_perplexity_that_is_not_measured_cannot_be_required() -> None:
    options = options_for("perplexity<3", more=("--perplexity", "false"))
    with pytest.raises(UserError, match="perplexity is measured with --perplexity alone"):
        requirements_of(options, ["base"])


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        ("general.forgot", ("--general", "rows.jsonl")),
        ("general.perplexity_rise", ("--general", "rows.jsonl")),
        ("general.accuracy_fall", ("--general", "rows.jsonl")),
        ("judge.win_rate", ("--judge", "http://127.0.0.1:9/v1")),
    ],
)
def test_what_is_measured_against_the_first_side_is_not_required_of_it(
    measure: str, options: tuple[str, ...]
) -> None:
    (one,) = requirements_of(options_for(f"{measure}<=0", more=options), list(VALUES))
    assert one.names == ("new", "newer")
    for text, names in ((f"base:{measure}<=0", list(VALUES)), (f"{measure}<=0", ["base"])):
        with pytest.raises(UserError, match="is that of a model against the first, base"):
            requirements_of(options_for(text, more=options), names)
