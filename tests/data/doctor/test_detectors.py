"""Each kind of finding in one row: written instances of it, and sound rows that look like one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qwen_ds.data.doctor.characters import classes_of
from qwen_ds.data.doctor.detectors import found_in
from qwen_ds.data.doctor.kinds import KINDS
from qwen_ds.data.doctor.spans import Span, Talk
from tests.adversarial.harness import Place, run

TEXTS: dict[str, list[tuple[str, str]]] = yaml.safe_load(
    (Path(__file__).parent / "texts" / "kinds.yaml").read_text(encoding="utf-8")
)
PERHAPS = {"answer-cut-midway": "no-full-stop"}  # decided by the endings of all answers


def spans(*texts: str, system: str = "") -> list[Span]:
    turns = tuple((("user", "assistant")[at % 2], text) for at, text in enumerate(texts))
    of_system, *classes = classes_of([system, *texts])
    return list(found_in(Talk(turns, tuple(classes), system, of_system)))


@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind != "none"])
def test_a_kind_is_found_in_each_of_its_instances(kind: str) -> None:
    assert kind in KINDS
    missed = []
    for row in TEXTS[kind]:
        found = {span.kind for span in spans(*row)}
        if kind not in found and PERHAPS.get(kind) not in found:
            missed.append((row, found))
    assert not missed


def test_sound_rows_have_no_finding() -> None:
    found = [(row, spans(*row)) for row in TEXTS["none"]]
    assert not [each for each in found if each[1]]


def test_a_span_is_where_the_mark_is() -> None:
    (found,) = spans("你好", "好的。<|im_end|>再见。")
    assert found == Span("special-token-in-text", 1, 3, 13)
    of_system = spans("你好", "您好。", system="你\u200b是助手")
    assert of_system == [Span("zero-width-character", -1, 1, 2)]


def test_answers_of_every_turn_are_looked_at() -> None:
    found = spans("你好", "您好。", "再说一次", "好的。</s>")
    assert [(span.kind, span.turn) for span in found] == [("special-token-in-text", 3)]


def test_numbers_count_only_with_their_check_digits() -> None:
    cards = ("11010519491231002X", "110105194912310021", "6222021234567890128")
    kinds = [[span.kind for span in spans("号码？", f"是{card}。")] for card in cards]
    assert kinds == [["id-card"], [], ["bank-card"]]
    assert [span.kind for span in spans("号码？", "是6222021234567890129。")] == []


def test_damage_explains_what_it_looks_like() -> None:
    """UTF-8 read as GBK has kana and rare characters; the finding is the damage alone."""
    text = "今天的天气真是很不错呢".encode().decode("gb18030", "ignore")
    assert {span.kind for span in spans("天气怎么样？", text)} == {"mojibake-gbk"}


# Texts of one unit over and over, and what an answer of it has.
LONG: dict[str, set[str]] = {
    "a": {"loop"}, "我是": {"loop"}, "抱歉": {"loop"}, "1": {"loop"}, "“": {"loop"},
    "(": {"loop", "unclosed-bracket"}, "?a=&": {"loop", PERHAPS["answer-cut-midway"]},
    "Ａ1": {"loop", "full-width-ascii"}, "\n答：": {"loop"}, "\n- ": set(), "\n": set(),
    " ": set(), "<": set(), "\\": set(), "=": set(),
    "%E4%BD%A0%E4%BD%A0 ": {"loop", "literal-escape"},
}  # fmt: skip
TIMES, CPU_SECONDS = 20_000, 20
EXAMINE_LONG = """
import json
from tests.data.doctor.test_detectors import LONG, TIMES, spans

for unit in LONG:
    answer = spans("问题是什么？", f"好{unit * TIMES}好")
    question = spans(f"好{unit * TIMES}好。", "什么是光合作用？")
    print(json.dumps([[span.kind for span in found] for found in (answer, question)]))
"""


def test_texts_are_no_cost_in_time_that_grows_faster_than_they_do(tmp_path: Path) -> None:
    """Two seconds of the CPU for all; a pattern that backtracks takes minutes for one."""
    script = tmp_path / "examine_long.py"
    script.write_text(EXAMINE_LONG)
    ended = run([script], Place(tmp_path, tmp_path), CPU_SECONDS)
    assert ended.code == 0, ended.err
    found = dict(zip(LONG, map(json.loads, ended.out.splitlines()), strict=True))
    assert {unit: set(answer) for unit, (answer, _) in found.items()} == LONG
    swapped = {unit for unit, (_, asked) in found.items() if "swapped-columns" in asked}
    assert swapped == LONG.keys() - {"?a=&"}, "which asks"
