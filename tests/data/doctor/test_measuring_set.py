"""The measuring set is sound: counts, clean rows that differ, numbers that are nobody's."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.data.doctor.clean import NUM_CLEAN, Row, alike, clean_rows, shingles
from tests.data.doctor.measure import Expected, score, write
from tests.data.doctor.planted import MARKED, NUM_INSTANCES, damaged, load, planted

MOBILE = re.compile(r"(?<!\d)(?:\+?86)?[ -]?1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?!\d)")
MAIL = re.compile(r"[\w.]+@[\w-]+(?:\.[\w-]+)+")
CARD = re.compile(r"(?<!\d)\d(?: ?\d){14,18}(?!\d)")
ID = re.compile(r"(?<!\d)\d{17}[\dX](?!\d)")
# Centre numbers of short messages end in 500; no person has one.
CENTRES = re.compile(r"(13800\d{3}500|13010\d{3}500)")
SPECIMENS = {"11010519491231002X", "440524188001010014"}  # printed in GB 11643-1999
TEST_CARDS = {"6226090000000048", "4111111111111111", "6216261000000000018"}


def texts(kind: str) -> str:
    rows = [row for instance in planted() if instance.kind == kind for row in instance.rows]
    return "\n".join(f"{row['instruction']}\n{row['output']}" for row in rows)


def luhn(number: str) -> bool:
    digits = [int(digit) for digit in reversed(number)]
    return (sum(digits[::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])) % 10 == 0


def is_id(number: str) -> bool:
    """ISO 7064 MOD 11-2 by its definition: the weighted sum of all digits leaves 1."""
    values = [10 if digit == "X" else int(digit) for digit in number]
    return sum(value * 2 ** (17 - place) for place, value in enumerate(values)) % 11 == 1


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return clean_rows()


def test_there_are_a_thousand_clean_rows_and_three_of_each_kind(rows: list[Row]) -> None:
    kinds = Counter(instance.kind for instance in planted())
    assert len(rows) == NUM_CLEAN
    assert len(kinds) >= 40 and set(kinds.values()) == {NUM_INSTANCES}


def test_no_two_clean_rows_are_nearly_the_same(rows: list[Row]) -> None:
    grams = [shingles(row) for row in rows]
    holders = defaultdict(list)
    for number, found in enumerate(grams):
        for gram in found:
            holders[gram].append(number)
    shared = Counter(pair for numbers in holders.values() for pair in combinations(numbers, 2))
    pairs = [(a, b) for (a, b), count in shared.items() if count > 0.3 * len(grams[a])]
    assert not [(rows[a], rows[b]) for a, b in pairs if alike(grams[a], grams[b]) > 0.5]
    assert len({row.instruction for row in rows}) == len(rows)
    assert len({(row.instruction, row.output) for row in rows}) == len(rows)


def test_no_clean_row_shares_its_question_with_a_planted_one(rows: list[Row]) -> None:
    """It would be a duplicate, and so the finding true."""
    asked = {row.instruction for row in rows}
    for instance in planted():
        for row in instance.rows:
            assert row.get("instruction") not in asked, row


def test_clean_rows_hold_nothing_that_is_always_a_defect(rows: list[Row]) -> None:
    never = re.compile(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffd\u200b\u2060\u200e\u200f\u202a-\u202e"
        "\u2066-\u2069\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]|锟斤拷|<\\|im_"
    )
    for row in rows:
        text = f"{row.instruction}\n{row.output}"
        assert not never.search(text), row
        assert row.instruction.strip() and row.output.strip() and row.instruction != row.output
        assert len(re.findall(r"^`{3,}", row.output, re.MULTILINE)) % 2 == 0, row
        # A pair of \u201c and \u201d, of \u300c and \u300d, of （ and ） each.
        for left, right in ("“”", "「」", "《》", "【】"):
            assert text.count(left) == text.count(right), row


def test_clean_rows_hold_no_personal_data(rows: list[Row]) -> None:
    for row in rows:
        text = f"{row.instruction}\n{row.output}"
        assert not MOBILE.search(text), row
        assert set(MAIL.findall(text)) <= {"git@github.com", "vue@3.4.0"}, row
        ids = [number for number in ID.findall(text) if is_id(number)]
        cards = [number for number in CARD.findall(text) if luhn(number.replace(" ", ""))]
        assert not ids and not cards, row


def test_personal_numbers_are_valid_and_nobodys() -> None:
    ids = ID.findall(texts("id-card"))
    assert len(set(ids)) == NUM_INSTANCES and all(map(is_id, ids))
    # Nobody born in 1900 or before lives under the third.
    assert all(number in SPECIMENS or number[6:10] == "1900" for number in ids)
    cards = {re.sub(" ", "", number) for number in CARD.findall(texts("bank-card"))}
    assert cards == TEST_CARDS and all(map(luhn, cards))
    mobiles = [re.sub(r"\D|^\+86", "", n) for n in MOBILE.findall(texts("phone"))]
    assert len(mobiles) == NUM_INSTANCES
    assert all(CENTRES.fullmatch(number.removeprefix("86")) for number in mobiles)


def test_no_mail_address_is_one_that_its_provider_gives_out() -> None:
    """163.com wants at most 18 characters, gmail.com at least 6, a QQ number no leading zero."""
    local = dict(reversed(a.split("@")) for a in MAIL.findall(texts("mail")))
    assert len(local) == NUM_INSTANCES
    assert len(local["163.com"]) > 18 and len(local["gmail.com"]) < 6
    assert local["qq.com"].startswith("0")


@pytest.mark.parametrize("kind", ["mojibake-latin1", "mojibake-gbk"])
def test_damaged_text_turns_back_into_the_text(kind: str) -> None:
    parts = 0
    for *pair, encoding in load("mojibake")[kind]:
        for text in pair:
            for part in MARKED.findall(text):
                broken = damaged(f"⟦{part}⟧", encoding)
                assert broken != part and part not in texts(kind) and broken in texts(kind)
                assert broken.encode(encoding).decode("utf-8") == part
                parts += 1
    assert parts == NUM_INSTANCES


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Expected]]:
    folder = tmp_path_factory.mktemp("measuring")
    return folder, write(folder)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def test_the_key_points_at_the_planted_rows(written: tuple[Path, list[Expected]]) -> None:
    folder, key = written
    for expected, instance in zip(key, planted(), strict=True):
        assert expected.kind == instance.kind
        stored = [lines_of(folder / file)[line - 1] for file, line in expected.places]
        assert tuple(stored) == instance.rows
    owned = {line for e in key for file, line in e.places if file == "rows.jsonl"}
    sound = [r for n, r in enumerate(lines_of(folder / "rows.jsonl"), 1) if n not in owned]
    assert {(r["instruction"], r["output"]) for r in sound} == {
        (row.instruction, row.output) for row in clean_rows()
    }
    assert len(sound) == NUM_CLEAN


def test_a_perfect_doctor_finds_all_and_a_silent_one_nothing(
    written: tuple[Path, list[Expected]],
) -> None:
    _, key = written
    perfect = [(e.kind, f"dir/{e.places[-1][0]}", e.places[-1][1]) for e in key]
    assert not score(key, perfect).missed and not score(key, perfect).false
    assert score(key, []).num_found == 0
    owned = {line for e in key for file, line in e.places if file == "rows.jsonl"}
    clean_line = next(number for number in range(1, NUM_CLEAN) if number not in owned)
    wrong = [("loop", "rows.jsonl", clean_line), ("kana", "rows.jsonl", None)]
    assert score(key, wrong).false == wrong[:1]
    renamed = [("repeats", *place[1:]) for place in perfect if place[0] == "loop"]
    assert score(key, renamed, {"repeats": "loop"}).num_found == NUM_INSTANCES
