"""The judge: sides swapped, every verdict kept, nothing asked twice."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.errors import Failed, UserError
from serve.endpoint import patience
from serve.options import EvaluateOptions, parse
from serve.scores.report import evaluate
from tests.serve.files.test_prediction import read_lines
from tests.serve.scripted_server import Body, Handler, Trouble, scripted

ROWS = 6
FIRST_WAIT = patience.FIRST_WAIT


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.02)


@pytest.fixture
def sides(tmp_path: Path) -> list[str]:
    """Two files of answers: "before" answers short, "after" long."""
    found = []
    for name, length in (("before", 2), ("after", 5)):
        file = tmp_path / f"{name}.jsonl"
        lines = [
            {
                "prompt": f"问题{i}",
                "reference": "好",
                "prediction": "很" * length,
                "source": f"x:{i}",
            }
            for i in range(ROWS)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.write_text(text, encoding="utf-8")
        found.append(str(file))
    return found


def says(verdict: Callable[[str, str, Body], str]) -> Trouble:
    """A judge that gives a verdict by the two answers, the first one first."""

    def judge(handler: Handler, body: Body, _: int) -> bool:
        if not body:
            return False
        asked = body["messages"][-1]["content"]
        first, second = re.findall(r"<<< 第.个回答 [0-9a-f]{16}\n(.*?)\n>>>", asked, re.DOTALL)
        reply = f"理由……\n{verdict(first, second, body)}"
        choice = {"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
        handler.reply(200, {"choices": [choice]})
        return True

    return judge


def longer(first: str, second: str, _: Body) -> str:
    return "[[1]]" if len(first) > len(second) else "[[2]]"


def judged(url: str, sides: list[str], output: Path, *more: str) -> dict[str, Any]:
    words = ["--predictions", *sides, "--judge", url, "--output_dir", str(output), *more]
    report = evaluate(parse(EvaluateOptions, "", words))
    assert report is not None
    found: dict[str, Any] = report["judge"]
    assert found == json.loads((output / "comparison.json").read_bytes())["judge"]
    return found


def test_a_judge_that_always_says_first_gives_half(sides: list[str], tmp_path: Path) -> None:
    with scripted(says(lambda *_: "[[1]]")) as server:
        found = judged(server.url, sides, tmp_path / "out")["results"]["after"]
    assert (found["win_rate"], found["low"], found["high"]) == (0.5, 0.5, 0.5)
    assert found["turned"] == found["ties"] == ROWS and found["wins"] == found["losses"] == 0
    assert found["first_share"] == 1.0


def test_a_model_may_be_named_tie(sides: list[str], tmp_path: Path) -> None:
    named = [f"tie={sides[0]}", sides[1]]
    with scripted(says(longer)) as server:
        found = judged(server.url, named, tmp_path / "lost")["results"]["after"]
        assert (found["win_rate"], found["turned"]) == (1.0, 0)
        found = judged(server.url, named[::-1], tmp_path / "won")["results"]["tie"]
        assert (found["win_rate"], found["turned"]) == (0.0, 0)
    with scripted(says(lambda *_: "[[tie]]")) as server:
        found = judged(server.url, named[::-1], tmp_path / "even")["results"]["tie"]
        assert (found["win_rate"], found["ties"]) == (0.5, ROWS)


def test_a_judge_with_a_reason_finds_the_better_side_in_both_orders(
    sides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(says(longer)) as server:
        more = ["--judge_model", "qwen", "--require", "judge.win_rate>=0.9"]
        section = judged(server.url, sides, tmp_path / "out", *more)
        assert server.bodies[0]["temperature"] == 0
    found = section["results"]["after"]
    assert (found["win_rate"], found["wins"], found["turned"]) == (1.0, ROWS, 0)
    assert found["verdicts"] == {"first": ROWS, "second": ROWS, "tie": 0}
    assert (section["against"], section["judge_model"]) == ("before", "qwen")
    lines = read_lines(tmp_path / "out" / "after" / "judge.jsonl")
    assert [line["id"] for line in lines] == list(range(2 * ROWS))
    assert [line["first"] for line in lines] == ["before", "after"] * ROWS
    assert {line["winner"] for line in lines} == {"after"}
    assert lines[0]["messages"][0]["role"] == "system" and "[[1]]" in lines[1]["reply"]
    shown = capsys.readouterr().out
    assert "100.0 % won (95 %: 100.0 to 100.0); 6 won, 0 lost" in shown
    assert "required  holds   after: judge.win_rate>=0.9  (1.0000)" in shown


def test_unreadable_verdicts_and_refusals_are_counted_and_left_out(
    sides: list[str], tmp_path: Path
) -> None:
    def judge(handler: Handler, body: Body, tries: int) -> bool:
        asked = body["messages"][-1]["content"] if body else ""
        if "问题0" in asked:
            handler.reply(400, {"error": {"message": "too long"}})
            return True
        return says(lambda *_: "hm" if "问题1" in asked else "[[tie]]")(handler, body, tries)

    with scripted(judge) as server:
        found = judged(server.url, sides, tmp_path / "out")["results"]["after"]
    assert (found["rows"], found["rows_judged"], found["ties"]) == (ROWS, ROWS - 2, ROWS - 2)
    assert (found["unreadable"], found["failed"], found["win_rate"]) == (2, 2, 0.5)
    assert found["turned"] == 0 and found["first_share"] is None


def test_a_judge_that_dies_is_asked_only_for_what_is_missing(
    sides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Waits as they are: within six seconds no request fails so often that it is given up alone,
    # which it may be where one of the answers came after its first failure.
    monkeypatch.setattr(patience, "FIRST_WAIT", FIRST_WAIT)
    requests = itertools.count()  # of side by side threads

    def dies(handler: Handler, body: Body, tries: int) -> bool:
        if body and next(requests) >= 5:
            handler.break_off()
            return True
        return says(longer)(handler, body, tries)

    output = tmp_path / "out"
    words = ("--timeout_minutes", "0.1")  # long beside a reply, on a busy machine, too
    with scripted(dies) as server:
        with pytest.raises(Failed, match="the same command goes on"):
            judged(server.url, sides, output, *words)
        # A reply may be lost on its way: known are those that came.
        kept = [line for part in output.rglob("rank_*.jsonl") for line in read_lines(part)]
        known = {line["messages"][-1]["content"] for line in kept}
        server.trouble = says(longer)
        server.bodies.clear()
        found = judged(server.url, sides, output, *words)["results"]["after"]
        again = [body["messages"][-1]["content"] for body in server.bodies]
    assert found["win_rate"] == 1.0
    assert 0 < len(known) < 2 * ROWS and len(again) == 2 * ROWS - len(known)
    assert not set(again) & known
    assert not list(output.rglob("*.parts"))


def test_replies_that_are_there_are_not_asked_for_again_when_replaced(
    sides: list[str], tmp_path: Path
) -> None:
    with scripted(says(longer)) as server:
        judged(server.url, sides, tmp_path / "out")
        before = (tmp_path / "out" / "after" / "judge.jsonl").read_bytes()
        server.bodies.clear()
        with pytest.raises(UserError, match="exists"):
            judged(server.url, sides, tmp_path / "out")
        judged(server.url, sides, tmp_path / "out", "--overwrite", "true")
        assert server.bodies == []
    assert (tmp_path / "out" / "after" / "judge.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--judge_model", "m"], "--judge_model is given without --judge"),
        (["--judge", "gpu01:8000"], "--judge gpu01:8000: not http"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_at_once(
    sides: list[str], tmp_path: Path, words: list[str], said: str
) -> None:
    options = ["--predictions", *sides, "--output_dir", str(tmp_path / "out"), *words]
    with pytest.raises(UserError, match=said):
        evaluate(parse(EvaluateOptions, "", options))


def test_one_side_alone_has_nothing_to_be_compared_with(sides: list[str], tmp_path: Path) -> None:
    options = ["--predictions", sides[0], "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="with one model; expected two or more"):
        evaluate(parse(EvaluateOptions, "", [*options, "--judge", "http://127.0.0.1:1/v1"]))
