"""A judge elsewhere compares the answers of two models: judge.jsonl, and the share of wins.

Each row is asked about twice, with the sides swapped. A row counts for the second model by the mean
of both verdicts (1 won, 1/2 tie, 0 lost), so a judge that always says "first" gives 50 %.
A row with a verdict that cannot be read, or with none, is left out and counted.

A line of judge.jsonl: id, row, source, first and second (the models in the order that the judge
saw), messages, reply, verdict (first, second, tie or null), winner; or error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.disk.place import output_file
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import turns_of
from qwen_ds.runlog import say
from serve.answering import Answer, Question
from serve.endpoint.client import Endpoint, connect
from serve.endpoint.options import EndpointOptions, base_url
from serve.files.parts import check_output, remove_parts
from serve.options import EvaluateOptions
from serve.scores.forgetting import mean_of
from serve.scores.judge_prompt import Language, Pair, conversation_of, language_of, verdict_of
from serve.scores.kept_rows import Line, kept_rows
from serve.scores.sides import Side

FILE = "judge.jsonl"
WIN_RATE = "judge.win_rate"
CONCURRENCY = 8
_JUDGE_OPTIONS = ("judge_model", "judge_key_file")


@dataclass(frozen=True, slots=True)
class JudgeQuestion:
    """One question to the judge, as both the request and the line of it are made."""

    row: int
    source: str
    first: str
    second: str
    question: Question

    @property
    def messages(self) -> list[dict[str, str]]:
        turns = turns_of(self.question.asked) if not isinstance(self.question.asked, str) else []
        return [{"role": turn.role, "content": turn.text} for turn in turns]

    def line(self, number: int, found: Answer | DecodingError) -> Line:
        """The line of judge.jsonl."""
        line: Line = {"id": number, "row": self.row, "source": self.source}
        line |= {"first": self.first, "second": self.second, "messages": self.messages}
        if isinstance(found, DecodingError):
            return line | {"verdict": None, "finish_reason": "error", "error": str(found)}
        verdict = verdict_of(found.text)
        winner = {"first": self.first, "second": self.second, "tie": "tie"}.get(verdict or "")
        return line | {"reply": found.text, "verdict": verdict, "winner": winner}


def check_judge(sides: Sequence[Side], options: EvaluateOptions) -> None:
    """Look at what a judge needs before anything is generated.

    UserError: options without a judge, one side alone, a URL that is none, or an output that
    exists.
    """
    if options.judge is None:
        for name in _JUDGE_OPTIONS:
            if vars(options)[name] is not None:
                raise UserError(f"--{name} is given without --judge; expected both or neither")
        return
    base_url(options.judge, "judge")
    if len(sides) < 2:
        raise UserError("--judge is given with one model; expected two or more (--compare)")
    for side in sides[1:]:
        check_output(output_file(side.folder / FILE), options.overwrite)


def judge_section(
    sides: Sequence[Side], answers: Sequence[Sequence[Line]], options: EvaluateOptions
) -> dict[str, Any]:
    """Have every side judged against the first: by name, the share of wins and the counts."""
    assert options.judge is not None
    given = EndpointOptions(options.judge, options.judge_model, options.judge_key_file)
    judge = connect(given, options.timeout_minutes * 60, say, CONCURRENCY)
    found: dict[str, Any] = {"judge": judge.url, "judge_model": judge.model}
    found |= {"against": sides[0].name, "results": {}}
    before = sides[0].name, answers[0]
    for side, after in zip(sides[1:], answers[1:], strict=True):
        asked = questions_of(before, (side.name, after), options)
        lines = judged(judge, asked, output_file(side.folder / FILE), options.overwrite)
        found["results"][side.name] = results_of(lines, side.name, options.seed)
    return found


def questions_of(
    before: tuple[str, Sequence[Line]], after: tuple[str, Sequence[Line]], options: EvaluateOptions
) -> list[JudgeQuestion]:
    """Two questions a row: in the order of the models, and swapped."""
    found = []
    sampling = SamplingParams(max_new_tokens=options.judge_max_tokens)
    for row, sides in enumerate(zip(before[1], after[1], strict=True)):
        prompt = str(sides[0].get("prompt") or "")
        language: Language = (
            language_of(prompt) if options.judge_language == "auto" else options.judge_language
        )
        named = [(before[0], sides[0]["prediction"]), (after[0], sides[1]["prediction"])]
        for (first, one), (second, other) in (named, named[::-1]):
            pair = Pair(prompt, one, other, sides[0].get("reference"))
            question = Question(conversation_of(pair, language), sampling)
            found.append(JudgeQuestion(row, str(sides[0]["source"]), first, second, question))
    return found


def judged(
    judge: Endpoint, asked: Sequence[JudgeQuestion], output: Path, overwrite: bool
) -> list[Line]:
    """The lines of judge.jsonl. A question that an output to be replaced has the reply to, of the
    same model, is not asked again, nor is one that an interrupted run has asked."""
    known = _replies(output, judge) if overwrite else {}
    settings = {
        "judge": judge.url,
        "judge_model": judge.model,
        "questions": _sum([one.messages for one in asked]),
        "max_tokens": asked[0].question.sampling.max_new_tokens,
    }

    def make(left: Sequence[int]) -> Iterator[Line]:
        unknown = []
        for i in left:
            if (reply := known.get(_sum(asked[i].messages))) is None:
                unknown.append(i)
            else:
                yield told(i, Answer(reply, "stop", None, None))
        for place, found in judge.answer([asked[i].question for i in unknown]):
            yield told(unknown[place], found)

    def told(i: int, found: Answer | DecodingError) -> Line:
        return asked[i].line(i, found) | {"judge_model": judge.model}

    return kept_rows(output, settings, len(asked), make, overwrite)


def _sum(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _replies(output: Path, judge: Endpoint) -> dict[str, str]:
    """Replies with a verdict of an earlier output of the same judge, by the sum of the messages."""
    found: dict[str, str] = {}
    if not output.is_file():
        return found
    for raw in output.read_bytes().split(b"\n"):
        try:
            line = json.loads(raw)
            is_usable = line["verdict"] is not None and line["judge_model"] == judge.model
            if is_usable:
                found[_sum(line["messages"])] = str(line["reply"])
        except (ValueError, TypeError, KeyError):  # not a line of ours
            continue
    return found


def results_of(lines: Sequence[Mapping[str, Any]], name: str, seed: int) -> dict[str, Any]:
    """The share of wins of `name` with its 95 % interval, over rows whose two verdicts are
    readable; and how often the verdicts were what."""
    of_row: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        of_row.setdefault(line["row"], []).append(line)
    whole = [both for both in of_row.values() if all(one["verdict"] for one in both)]
    scores_N2 = np.array([[_points(one, name) for one in both] for both in whole])
    verdicts = [line["verdict"] for line in lines]
    decided = [verdict for verdict in verdicts if verdict in ("first", "second")]
    found: dict[str, Any] = {"rows": len(of_row), "rows_judged": len(whole), "win_rate": None}
    if whole:
        wins_N = scores_N2.mean(1)
        rate, low, high = mean_of(wins_N, np.ones(len(wins_N)), np.random.default_rng(seed))
        found |= {"win_rate": rate, "low": low, "high": high}
        found |= {"wins": int((wins_N > 0.5).sum()), "losses": int((wins_N < 0.5).sum())}
        found["ties"] = int((wins_N == 0.5).sum())
        found["turned"] = sum(_has_turned(both) for both in whole)
    return found | {
        "verdicts": {kind: verdicts.count(kind) for kind in ("first", "second", "tie")},
        "unreadable": sum("reply" in one and one["verdict"] is None for one in lines),
        "failed": sum("error" in line for line in lines),
        "first_share": verdicts.count("first") / len(decided) if decided else None,
    }


def _points(line: Mapping[str, Any], name: str) -> float:
    """Points of a verdict for a model, which may itself be named "tie"."""
    return 0.5 if line["verdict"] == "tie" else float(line[line["verdict"]] == name)


def _has_turned(both: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each order has another winner: the judge went by the place."""
    return {line["verdict"] for line in both} in ({"first"}, {"second"})


def judge_values(section: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """WIN_RATE of all sides but the first; None where no row has two verdicts."""
    return {name: {WIN_RATE: found["win_rate"]} for name, found in section["results"].items()}


def judge_in_words(section: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal."""
    out = []
    for name, found in section["results"].items():
        if found["win_rate"] is None:
            out.append(f"judge, {name} against {section['against']}: no verdict could be read")
            continue
        rate, low, high = (100 * found[key] for key in ("win_rate", "low", "high"))
        told = f"{rate:.1f} % won (95 %: {low:.1f} to {high:.1f})"
        told += f"; {found['wins']} won, {found['losses']} lost, {found['ties']} even, of them "
        told += f"{found['turned']} that turned with the order"
        if left := found["rows"] - found["rows_judged"]:
            told += f"; {left} rows without both verdicts left out"
        out.append(f"judge, {name} against {section['against']}: {told}")
    return out


def remove_judge_parts(sides: Sequence[Side]) -> None:
    """Remove what an interrupted run would need, once the reports are written."""
    for side in sides[1:]:
        remove_parts(output_file(side.folder / FILE))
