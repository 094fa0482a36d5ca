"""The page of a check: its findings as tables, with the places marked."""

from __future__ import annotations

from collections import Counter
from typing import Any

from qwen_ds.data.doctor.limits import LIMITS
from qwen_ds.page.html import count, environment, figure

_JOINERS = "\u200c\u200d"


def page(summary: dict[str, Any]) -> str:
    """The content of report.html for that of summary.json."""
    findings = [
        {**each, "examples": [_example(each["finding"], one) for one in each["examples"]]}
        for each in summary["findings"]
    ]
    numbers = Counter(each["severity"] for each in findings)
    template = environment(__package__).get_template("doctor.html.j2")
    return template.render(
        title=", ".join(summary["files"]),
        verdict="stop" if numbers["stop"] else "warn" if numbers["warn"] else "good",
        words=_words(numbers, summary["rows"]),
        cards=_cards(summary),
        findings=findings,
        cuts=summary["cut_by_limit"],
        limits=[str(limit) for limit in LIMITS],
        tokens=summary["tokens"],
        files=summary["files"],
        not_read=summary["not_read"],
    )


def _example(kind: str, example: dict[str, Any]) -> dict[str, Any]:
    """An example with all that the template names. Joiners, which texts keep as they are, are
    spelled where they are the finding."""
    marked = example.get("marked", "")
    if kind == "zero-width-character":
        marked = "".join(ascii(char)[1:-1] if char in _JOINERS else char for char in marked)
    return {"detail": "", **example, "marked": marked}


def _words(numbers: Counter[str], rows: int) -> str:
    checked = f"{count(rows, 'row')} checked"
    if numbers["stop"]:
        return f"{checked}. Do not train on this yet: {count(numbers['stop'], 'finding')} to mend."
    if numbers["warn"]:
        found = count(numbers["warn"], "kind of damaged row", "kinds of damaged rows")
        return f"{checked}. {found}: look at them before training."
    if numbers["note"]:
        return f"{checked}. Nothing is wrong; {count(numbers['note'], 'remark')}."
    return f"{checked}. Nothing was found."


def _cards(summary: dict[str, Any]) -> list[tuple[str, str]]:
    cards = [("rows", figure(summary["rows"]))]
    if summary["rows_of_eval"]:
        cards.append(("rows of data.eval", figure(summary["rows_of_eval"])))
    if summary["rows_of_test_sets"]:
        cards.append(("rows of test sets", figure(summary["rows_of_test_sets"])))
    cards.append(("rows not trained on", figure(sum(summary["not_trained_on"].values()))))
    if "kept" in summary:
        cards += [("rows kept", figure(summary["kept"])), ("dropped", figure(summary["dropped"]))]
    if "losses" in summary:
        cards.append(("mean loss of a row, nats a token", figure(summary["losses"]["mean"])))
    return cards
