"""Answers to read: samples over time, the worst rows of an evaluation, models side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from qwen_ds.report.evaluations import Evaluation
from qwen_ds.report.folder import Row, number
from qwen_ds.report.significance import key_of_rows, matched, row_key

MAX_PROMPTS, MAX_MOMENTS = 5, 6
WORST, BEST = 5, 2
CHANGED = 4  # rows that got better most, and as many that got worse
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)


class SampledPrompt(NamedTuple):
    """One prompt with its reference, and the answers to it after some steps."""

    prompt: str
    reference: str
    answers: list[tuple[Any, str]]


class RankedRow(NamedTuple):
    """A row of an evaluation: where it comes from, its score, the texts, and whether it is one of
    the best."""

    source: str
    score: float
    prompt: str
    reference: str
    prediction: str
    is_best: bool = False


class Changed(NamedTuple):
    """A row as several models answered it; `scores` are those of the ranking measure."""

    source: str
    prompt: str
    reference: str
    answers: list[tuple[str, float | None]]


def question(prompt: object) -> str:
    """The last turn that a prompt in ChatML asks, without its markers; another prompt as it is."""
    text = str(prompt or "")
    asked = [said for role, said in _TURN.findall(text) if role == "user"]
    return asked[-1] if asked else text


def sampled(samples: Sequence[Row]) -> list[SampledPrompt]:
    """The first prompts with the answers of some moments, first and last among them."""
    by_prompt: dict[tuple[str, str], list[Row]] = {}
    for row in samples:
        by_prompt.setdefault((str(row["prompt"]), str(row["reference"])), []).append(row)
    found = []
    for (prompt, reference), rows in list(by_prompt.items())[:MAX_PROMPTS]:
        moments = len(rows)
        if moments > MAX_MOMENTS:
            at = {round(i * (moments - 1) / (MAX_MOMENTS - 1)) for i in range(MAX_MOMENTS)}
            rows = [rows[i] for i in sorted(at)]
        answers = [(row["step"], str(row["answer"])) for row in rows]
        found.append(SampledPrompt(question(prompt), reference, answers))
    return found


def count_prompts(samples: Sequence[Row]) -> int:
    return len({(str(row["prompt"]), str(row["reference"])) for row in samples})


def sampled_last(runs: Sequence[Sequence[Row]]) -> list[Changed]:
    """The last sampled answer of every run to the prompts that all of them have."""
    last = [{str(row["prompt"]): row for row in samples} for samples in runs]
    shared = [prompt for prompt in last[0] if all(prompt in each for each in last)]
    return [
        Changed(
            "",
            question(prompt),
            str(last[0][prompt].get("reference") or ""),
            [(str(each[prompt]["answer"]), None) for each in last],
        )
        for prompt in shared[:MAX_PROMPTS]
    ]


def ranked(evaluation: Evaluation) -> list[RankedRow]:
    """The worst rows by the evaluation's main score, the worst first, and then the best."""
    name = evaluation.main
    rows = [
        RankedRow(
            str(line.get("source", "")),
            score,
            question(line.get("prompt")),
            _reference(line),
            str(line.get("prediction") or ""),
        )
        for row, line in matched(evaluation.rows, evaluation.predictions)
        if (score := number(row, name)) is not None
    ]
    rows.sort(key=lambda row: row.score)
    best = rows[WORST:][: -BEST - 1 : -1]
    return [*rows[:WORST], *(row._replace(is_best=True) for row in best)]


def _reference(line: Row) -> str:
    """The reference of a line; of several each in its own line."""
    found = line.get("references") or line.get("reference") or ""
    return "\n".join(map(str, found)) if isinstance(found, list) else str(found)


def changed(evaluations: Sequence[Evaluation]) -> list[Changed] | None:
    """Rows that the first and the last evaluation answer most differently by score, in both
    directions, with the answers of all; without scores the first rows. Rows that all answer alike
    are left out; None: no row is on all sides."""
    name = evaluations[0].main
    key = key_of_rows(*(e.predictions for e in evaluations))
    of_rows = [{row_key(row, key): row for row in e.rows} for e in evaluations]
    of_lines = [{row_key(line, key): line for line in e.predictions} for e in evaluations]

    def answer(side: int, at: Any) -> str:
        return str(of_lines[side].get(at, {}).get("prediction") or "")

    def is_changed(at: Any) -> bool:
        return len({answer(side, at) for side, lines in enumerate(of_lines) if at in lines}) > 1

    def score(side: int, at: Any) -> float | None:
        return number(of_rows[side].get(at, {}), name)

    def gain(at: Any) -> float:
        before, after = score(0, at), score(-1, at)
        return 0.0 if before is None or after is None else after - before

    of_first = [row_key(line, key) for line in evaluations[0].predictions]
    shared = [at for at in of_first if at and at in of_lines[-1]]
    if not shared:
        return None
    ranked_places = sorted(filter(is_changed, shared), key=gain)
    picked = dict.fromkeys([*ranked_places[::-1][:CHANGED], *ranked_places[:CHANGED]])
    return [
        Changed(
            str(at[0]),
            question(of_lines[0][at].get("prompt")),
            _reference(of_lines[0][at]),
            [(answer(side, at), score(side, at)) for side in range(len(of_lines))],
        )
        for at in picked
    ]
