"""A thousand rows that a careful person would call free of defects, and some more to fill files.

They hold a hard case for every check: brackets in code, 是的 as a whole answer, Japanese where it
was asked for, hotlines, twenty-digit numbers, emoji of several code points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

import yaml

from tests.data.doctor.families import (
    TEXTS,
    Family,
    Pair,
    dialogue,
    fashion,
    how_to,
    letters,
    lines,
    mails,
    people,
    reviews,
    service,
    table,
    translations,
)
from tests.data.doctor.sums import sums_en, sums_zh, tables

SEED = 20230815
NUM_CLEAN = 1000
GRAM = 4  # characters of a shingle
MAX_ALIKE = 0.45  # Jaccard of the shingles of two rows of one family


@dataclass(frozen=True, slots=True)
class Row:
    """A question and its answer."""

    instruction: str
    output: str


def shingles(row: Row) -> frozenset[str]:
    text = f"{row.instruction}\n{row.output}"
    return frozenset(text[i : i + GRAM] for i in range(max(1, len(text) - GRAM + 1)))


def alike(one: frozenset[str], other: frozenset[str]) -> float:
    """The Jaccard similarity of two sets of shingles."""
    both = len(one & other)
    return both / (len(one) + len(other) - both)


def written(name: str) -> Family:
    """The rows of a YAML list of q and a, in order."""

    def draw(rng: Random) -> Iterator[Pair]:
        for row in yaml.safe_load((TEXTS / f"{name}.yaml").read_text(encoding="utf-8")):
            yield row["q"], row["a"]

    return draw


def plain(name: str) -> Family:
    """The rows of a text file of questions and answers."""

    def draw(rng: Random) -> Iterator[Pair]:
        yield from ((question, answer) for question, answer in lines(name))

    return draw


FAMILIES: dict[str, Family] = {
    "careful": written("careful"),
    "code": written("code"),
    "long": written("long"),
    "traditional": plain("traditional"),
    "science_en": plain("science_en"),
    "howto": how_to,
    "translations": translations,
    "reviews": reviews,
    "idioms": table(
        "idioms",
        (["成语“{0}”是什么意思？", "{0}怎么理解？"], ["{1}。例如：{2}。", "“{0}”指{1}。"]),
        (["解释一下{0}，并造句。"], ["意思是{1}。造句：{2}。", "【释义】{1}\n【例句】{2}。"]),
        (["哪个成语的意思是“{1}”？"], ["{0}", "是“{0}”，例如：{2}。"]),
    ),
    "countries": table(
        "countries",
        (["{0}的首都在哪里？"], ["{1}", "{0}的首都是{1}。"]),
        (["介绍一下{0}。"], ["{0}位于{4}，首都是{1}，通用货币为{2}，以{3}著称。"]),
        (["{0}的国家名片"], ["首都：{1}\n货币：{2}\n位置：{4}\n特色：{3}"]),
        (["去{0}旅游用什么货币？"], ["用{2}。顺便说一句，那里以{3}闻名。", "{2}"]),
    ),
    "elements": table(
        "elements",
        (["{0}元素的符号和原子序数是什么？"], ["{0}的符号是{1}，原子序数{2}。", "{1}，{2}"]),
        (["请介绍化学元素{0}({1})。"], ["{0}({1})的原子序数是{2}，{3}。"]),
        (["第{2}号元素是什么？"], ["是{0}，符号{1}。{3}。"]),
    ),
    "sights": table(
        "sights",
        (["去{0}玩，{1}值得看吗？"], ["值得。{1}{2}。建议{3}去，顺便尝尝{4}。"]),
        (["帮我写一段{1}的介绍。"], ["{1}位于{0}，{2}。最佳季节：{3}。", "{0}{1}：{2}。"]),
        (["{0}什么时候去最好？吃什么？"], ["推荐{3}，一定要吃{4}，再去看看{1}。"]),
    ),
    "recipes": table(
        "recipes",
        (
            ["{0}怎么做？", "我想学做{0}，请给出食材和步骤。", "{0}的家常做法"],
            ["食材：{1}。\n做法：{2}。\n小贴士：{3}。", "【食材】{1}\n【步骤】{2}\n【提示】{3}"],
        ),
    ),
    "words": table(
        "words",
        (["{0}是什么意思？请给个例句。"], ["{0}意为“{1}”。例句：{2}"]),
        (["Explain the word \"{0}\" to a Chinese learner."], ["{0}: {1}\nExample: {2}"]),
        (["用{0}造一个英文句子。"], ["{2}"]),
    ),
    "foreign": table(
        "foreign",
        (
            ["用{0}怎么说“{1}”？", "把“{1}”翻译成{0}。", "{0}里“{1}”怎么写？"],
            ["{2}", "{0}是：{2}", "“{1}”的{0}是“{2}”。"],
        ),
    ),
    "sums_zh": sums_zh,
    "sums_en": sums_en,
    "tables": tables,
    "people": people,
    "service": service,
    "letters": letters,
    "mails": mails,
    "dialogue": dialogue,
    "fashion": fashion,
}  # fmt: skip
# Endless families: how many clean rows each gives (`fashion`: as many as are missing).
WANTED = {"sums_zh": 60, "sums_en": 35, "tables": 45, "people": 45, "service": 40, "dialogue": 32}
# Rows beyond the clean ones, for files of their own.
SPARE = {"fashion": 75, "sums_zh": 35, "sums_en": 35, "tables": 70, "people": 35, "service": 35}
MAX_TRIES = 8000


def take(name: str, num_rows: int | None) -> list[Row]:
    """Rows of a family, no two of which are alike; all of them where num_rows is None."""
    kept: list[Row] = []
    seen: list[frozenset[str]] = []
    for tries, (question, answer) in enumerate(FAMILIES[name](Random(f"{SEED} {name}"))):
        if len(kept) == num_rows or tries > MAX_TRIES:
            break
        row = Row(question, answer)
        grams = shingles(row)
        known = any(row.instruction == other.instruction for other in kept)
        if not known and all(alike(grams, other) <= MAX_ALIKE for other in seen):
            kept.append(row)
            seen.append(grams)
    assert num_rows is None or len(kept) == num_rows, f"{name}: {len(kept)} rows that differ"
    return kept


@cache
def all_rows() -> tuple[tuple[Row, ...], dict[str, list[Row]]]:
    """The clean rows, mixed, and the spare ones by family."""
    rows = [row for name in FAMILIES if name not in SPARE for row in take(name, WANTED.get(name))]
    wanted = {**WANTED, "fashion": NUM_CLEAN - len(rows)}
    wanted["fashion"] -= sum(WANTED[name] for name in WANTED if name in SPARE)
    spare = {}
    for name, more in SPARE.items():
        found = take(name, wanted[name] + more)
        rows += found[: wanted[name]]
        spare[name] = found[wanted[name] :]
    Random(SEED).shuffle(rows)
    return tuple(rows), spare


def clean_rows() -> list[Row]:
    """The thousand clean rows, always the same."""
    return list(all_rows()[0])


def spare_rows(family: str) -> list[Row]:
    """Rows of a family that are not among the clean ones."""
    return all_rows()[1][family]
