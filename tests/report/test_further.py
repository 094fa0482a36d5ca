"""Forgetting, judge and gate of an evaluation, as tables and as sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_ds.report.evaluations import Score, find, tables
from qwen_ds.report.folder import read_run
from qwen_ds.report.further import Further, further, sentences
from tests.report.runs import make_evaluation, make_run, write_object

Rates = tuple[float, float, float]


def sections(verdict: str = "no sign", rates: Rates = (0.7, 0.6, 0.8)) -> dict[str, Any]:
    """Sections of a comparison.json, as serve.evaluate writes them."""
    value, low, high = rates
    change = {"verdict": verdict, "in_words": "perplexity of 40 texts: 9 before, 12 after"}
    return {
        "models": ["base", "tuned"],
        "general": {
            "files": ["general.jsonl"],
            "rows": 40,
            "scores": {
                "base": {"perplexity": [9.0, 8.5, 9.5]}, "tuned": {"accuracy": [0.5, 0.4, 0.6]},
            },
            "against": "base",
            "changes": {"tuned": {"verdict": verdict, "texts": change, "failed": 0}},
        },
        "judge": {
            "judge": "http://127.0.0.1:1/v1",
            "judge_model": "large",
            "against": "base",
            "results": {"tuned": {
                "rows": 10, "win_rate": value, "low": low, "high": high, "wins": 6, "losses": 2,
                "ties": 2, "turned": 1, "unreadable": 0, "failed": 0,
            }},
        },
        "gate": [
            {"require": "stop_rate>=0.99", "model": "tuned", "value": 0.5, "met": False},
            {"require": "chrf>=1", "model": "tuned", "value": 9.0, "met": True},
        ],
    }  # fmt: skip


def made(folder: Path, report: dict[str, Any]) -> list[Further]:
    run_folder = make_run(folder / "run")
    for name in ("base", "tuned"):
        make_evaluation(run_folder / "all" / name, [0.5, 0.6], name)
    write_object(run_folder / "all" / "comparison.json", report)
    run = read_run(run_folder)
    (table,) = tables(run, find(run))
    return further(table)


def test_all_sections_become_tables(tmp_path: Path) -> None:
    (found,) = made(tmp_path, sections())
    assert found.forgetting is not None and found.forgetting.models == ["base", "tuned"]
    assert found.forgetting.figures == [
        ("perplexity", [Score(9.0, 8.5, 9.5), Score(None)]),
        ("accuracy", [Score(None), Score(0.5, 0.4, 0.6)]),
    ]
    (judged,) = found.judged
    assert found.judge == "large" and judged.win_rate == Score(0.7, 0.6, 0.8)
    assert judged.counts == "6 won, 2 lost, 2 even, 1 turned with the order"
    assert [each.met for each in found.required] == [False, True]


@pytest.mark.parametrize(
    "verdict, severity", [("forgot", "warn"), ("no sign", "good"), ("cannot tell", "note")]
)
def test_the_verdict_tells_what_was_forgotten(tmp_path: Path, verdict: str, severity: str) -> None:
    first = sentences(made(tmp_path, sections(verdict)))[0]
    assert first.text.startswith("Forgetting, tuned: perplexity of 40 texts: 9 before")
    assert first.severity == severity


@pytest.mark.parametrize(
    "rates, severity",
    [((0.7, 0.6, 0.8), "good"), ((0.5, 0.4, 0.6), "note"), ((0.2, 0.1, 0.3), "warn")],
)
def test_the_verdict_tells_whom_the_judge_prefers(
    tmp_path: Path, rates: Rates, severity: str
) -> None:
    second = sentences(made(tmp_path, sections(rates=rates)))[1]
    assert second.severity == severity and "The judge large prefers tuned in" in second.text


def test_the_verdict_tells_what_was_required_and_missed(tmp_path: Path) -> None:
    last = sentences(made(tmp_path, sections()))[-1]
    assert last == ("Required and missed: stop_rate>=0.99 (tuned: 0.5).", "stop")


def test_an_evaluation_without_them_has_none(tmp_path: Path) -> None:
    assert made(tmp_path, {"models": ["base", "tuned"]}) == []
