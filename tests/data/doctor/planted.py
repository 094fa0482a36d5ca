"""Defects of known kinds, three instances each, and the finding that must name each.

The written ones stand in texts/planted.yaml and texts/private.yaml. Damaged encodings come from
real round trips here, and so do texts that are long and whole files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import yaml

from tests.data.doctor.clean import SEED, Row, spare_rows
from tests.data.doctor.families import TEXTS, lines

NUM_INSTANCES = 3
FILE_ROWS = 35
ROWS_FILE = "rows.jsonl"  # the clean rows, and the defects of single rows among them
# Findings that name a kind as well as its own name does.
ALSO = {
    "bom": ("zero-width-character",),  # inside a text, U+FEFF is a zero-width no-break space
    "kun-kao": ("mojibake-gbk",),
}
MARKED = re.compile("⟦(.*?)⟧", re.DOTALL)
ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


@dataclass(frozen=True, slots=True)
class Planted:
    """One instance of a defect: the rows that make it up, or a file that is wrong as a whole.

    `files` has the file of each row. With whole_file a finding on any of its lines or on the file
    itself counts.
    """

    kind: str
    rows: tuple[dict[str, Any], ...]
    files: tuple[str, ...]
    whole_file: bool = False

    @property
    def findings(self) -> tuple[str, ...]:
        """The names of which one must be reported."""
        return (self.kind, *ALSO.get(self.kind, ()))


def among_rows(kind: str, *rows: dict[str, Any]) -> Planted:
    return Planted(kind, rows, (ROWS_FILE,) * len(rows))


def as_dict(question: str, answer: str) -> dict[str, Any]:
    return {"instruction": question, "output": answer}


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((TEXTS / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def id_number(first_17: str) -> str:
    """A citizen's number with its check digit (GB 11643, ISO 7064 MOD 11-2)."""
    total = sum(int(digit) * weight for digit, weight in zip(first_17, ID_WEIGHTS, strict=True))
    return first_17 + "10X98765432"[total % 11]


def damaged(text: str, encoding: str) -> str:
    """The text with each ⟦part⟧ as UTF-8 read in another encoding."""
    return MARKED.sub(lambda m: m[1].encode("utf-8").decode(encoding), text)


def written_instances() -> Iterator[Planted]:
    numbers = {"id": id_number("11010119000101001")}
    for name in ("planted", "private"):
        for kind, instances in load(name).items():
            for rows in instances:
                if name == "private":
                    rows = [[text.replace("{id}", numbers["id"]) for text in row] for row in rows]
                planted = among_rows(kind, *(as_dict(*row) for row in rows))
                if kind == "exact-duplicate" and rows == instances[-1]:
                    planted = Planted(kind, planted.rows, (ROWS_FILE, "more.jsonl"))
                yield planted
    for kind, instances in load("mojibake").items():
        for question, answer, encoding in instances:
            texts = (damaged(text, encoding) for text in (question, answer))
            yield among_rows(kind, as_dict(*texts))


def long_instances() -> Iterator[Planted]:
    """Answers beyond the usual limits in tokens, none of which repeats itself."""
    idioms = "\n".join(f"{name}：{meaning}。例：{use}。" for name, meaning, use in lines("idioms"))
    advice = "\n\n".join(
        f"To {title}:\n" + "\n".join(f"- {point}." for point in points)
        for title, *points in lines("tips_en")
    )
    world = "\n".join(
        [f"{name}：首都{city}，货币{money}，特产{fame}。" for name, city, money, fame, _ in
         lines("countries")]
        + [f"{name}（{sign}，{number}）：{use}。" for name, sign, number, use in lines("elements")]
        + [f"{city}的{sight}：{text}，{when}去，吃{food}。" for city, sight, text, when, food in
           lines("sights")]
        + [f"{dish}：{food}。{steps}。{hint}。" for dish, food, steps, hint in lines("recipes")]
    )  # fmt: skip
    questions = ("把常见的成语整理成一份讲义。", "Write a booklet of advice.", "编一本小百科。")
    for question, answer in zip(questions, (idioms, advice, world), strict=True):
        yield among_rows("cut-by-limit", as_dict(question, answer))
    rng = Random(SEED)
    log = "\n".join(
        f"{hour:02}:{minute:02} worker-{rng.randrange(9)} job {rng.randrange(16**8):08x} took "
        f"{rng.randrange(9000)} ms, {rng.choice(['done', 'retried', 'queued', 'moved'])}"
        for hour in range(24)
        for minute in range(60)
    )
    yield among_rows("extreme-length", as_dict("贴一份服务日志的样例。", log))
    material = "\n".join([idioms, world, *("，".join(row) for row in lines("howto")), advice])
    yield among_rows("extreme-length", as_dict(f"概括下面的材料：\n{material}", "是一份常识汇编。"))
    essay = "请写一篇不少于八百字的记叙文，题目是《那一次，我真后悔》，要求有细节、有心理描写。"
    yield among_rows("extreme-length", as_dict(essay, "嗯"))


def whole(kind: str, name: str, rows: list[dict[str, Any]]) -> Planted:
    return Planted(kind, tuple(rows), (name,) * len(rows), whole_file=True)


def columns(family: str, question: str, answer: str, start: int = 0) -> list[dict[str, Any]]:
    """Spare rows of a family under the names of two columns."""
    rows = spare_rows(family)[start : start + FILE_ROWS]
    assert len(rows) == FILE_ROWS
    return [{question: row.instruction, answer: row.output} for row in rows]


def file_instances() -> Iterator[Planted]:
    """Empty answers, and columns that are empty, constant or swapped in a file of their own."""
    kind = "empty-answer-or-column"
    yield among_rows(kind, as_dict("请写出三个带“风”字的词语。", ""))
    yield among_rows(kind, as_dict("What is the plural of goose?", " \n\u3000"))
    empty = [{**row, "output": ""} for row in columns("sums_en", "instruction", "output")]
    yield whole(kind, "empty_column.jsonl", empty)

    kind = "constant-column"
    rows = columns("people", "instruction", "output")
    same = "好的，已经按照您的要求整理完毕。"
    yield whole(kind, "constant_answer.jsonl", [{**row, "output": same} for row in rows])
    rows = columns("tables", "instruction", "output")
    yield whole(
        kind, "constant_question.jsonl", [{**row, "instruction": "请回答。"} for row in rows]
    )
    rows = columns("tables", "instruction", "output", FILE_ROWS)
    rows = [
        {"instruction": r["instruction"], "input": "无输入", "output": r["output"]} for r in rows
    ]
    yield whole(kind, "constant_input.jsonl", rows)

    kind = "swapped-columns"
    yield whole(kind, "swapped_copy.jsonl", columns("fashion", "summary", "content"))
    yield whole(kind, "swapped_sums.jsonl", columns("sums_zh", "output", "instruction"))
    yield whole(kind, "swapped_service.jsonl", columns("service", "response", "prompt"))


def turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def role_instances() -> Iterator[Planted]:
    bad = [
        turns(
            ("user", "帮我起个猫的名字。"),
            ("user", "要两个字的。"),
            ("assistant", "可以叫“年糕”，又软又白。"),
        ),
        turns(
            ("assistant", "Good evening! How may I help you?"),
            ("user", "A table for four, please."),
            ("assistant", "Certainly, this way."),
        ),
        turns(
            ("user", "今晚吃什么好？"),
            ("assistant", "番茄牛腩面怎么样？"),
            ("system", "你是一名营养师。"),
            ("user", "热量高吗？"),
            ("assistant", "一碗大约六百千卡，不算高。"),
        ),
    ]
    for row in bad:
        yield Planted("role-order", (row,), ("messages.jsonl",))


def filling() -> dict[str, list[dict[str, Any]]]:
    """Sound rows for the files beside `rows.jsonl` in which defects of single rows stand."""
    rows = spare_rows("fashion")[FILE_ROWS:]
    half = len(rows) // 2
    return {
        "more.jsonl": [as_dict(row.instruction, row.output) for row in rows[:half]],
        "messages.jsonl": [as_messages(row) for row in rows[half:]],
    }


def as_messages(row: Row) -> dict[str, Any]:
    return turns(("user", row.instruction), ("assistant", row.output))


def planted() -> list[Planted]:
    """All instances, those of a kind beside each other."""
    found = [
        *written_instances(),
        *long_instances(),
        *file_instances(),
        *role_instances(),
    ]
    return sorted(found, key=lambda planted: planted.kind)
