"""Names, rows and options that hold what a terminal acts on: it is shown, never sent."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.adversarial.harness import Member, Place, check, run

ACTING = {
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;eA==\x07",
    "clear": "\x1b[2J\x1b[H",
    "colour": "\x1b[31m",
    "C1": "\x9b31m",
    "return": "a\rb",
    "backspace": "a\x08\x08",
    "bidi": "\u202egpj.\u2066",
    "separator": "a\u2028b",
    "line feed": "a\nb",
    "invalid UTF-8": "\udcff\udc9b",
    "markup": "[red]x[/] [/nothing] train[v2]",
}
_SENT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

Make = Callable[[str, Place], Sequence[str | Path]]


def _data(command: str, file: Path, place: Place) -> Sequence[str | Path]:
    return ["data", command, "--model.path", place.base(), "--data.train", file,
            "--data.cache_dir", place.out / "cache"]  # fmt: skip


def _row(command: str, text: str, place: Place) -> Sequence[str | Path]:
    rows = [{"content": f"q{text}{i}", "summary": f"a{text}{i}"} for i in range(3)]
    return _data(command, place.rows(*rows), place)


def _file(command: str, text: str, place: Place) -> Sequence[str | Path]:
    return _data(command, place.rows(name=f"{text}.jsonl"), place)


def _bad_file(text: str, place: Place) -> Sequence[str | Path]:
    return _data("encode", place.rows({f"key{text}": 1}, name=f"{text}.jsonl"), place)


def _option(text: str, place: Place) -> Sequence[str | Path]:
    return ["plan", f"--{text.replace('=', '')}", "1"]


def _value(text: str, place: Place) -> Sequence[str | Path]:
    return ["plan", f"--gpu={text}"]


def _recipe(text: str, place: Place) -> Sequence[str | Path]:
    return ["plan", "--config", place.here / text]


def _json(text: str, place: Place) -> Sequence[str | Path]:
    key = text.encode(errors="replace").decode()
    return ["plan", "--deepspeed", place.json("ds.json", {f"key{key}": 1})]


def _model(text: str, place: Place) -> Sequence[str | Path]:
    return ["predict", "--model", place.here / text, "--input", "x", "--output", place.out / "y"]


FAILING: dict[str, Make] = {
    "a bad file": _bad_file, "an option": _option, "a value": _value, "a recipe": _recipe,
    "a JSON key": _json, "a model": _model,
}  # fmt: skip
SHOWING: dict[str, Make] = {
    "inspected rows": partial(_row, "inspect"), "encoded rows": partial(_row, "encode"),
    "an inspected file": partial(_file, "inspect"), "an encoded file": partial(_file, "encode"),
}  # fmt: skip
MEMBERS = [
    Member(f"{where}: {what}", partial(make, text), code)
    for makes, code in ((FAILING, 2), (SHOWING, 0))
    for where, make in makes.items()
    for what, text in ACTING.items()
    # Not in files: JSON in UTF-8 has no lone surrogate, and a list of options takes none.
    if not (("row" in where or "file" in where) and what == "invalid UTF-8")
]


def _sent(place: Place) -> list[str]:
    """What of a member's output a terminal would act on; a bar is redrawn by returns."""
    out = (place.here / "stdout").read_text("utf-8") + (place.here / "stderr").read_text("utf-8")
    return _SENT.findall(out.replace("\r", "")) if "tokenising" in out else _SENT.findall(out)


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_nothing_acts(member: Member, tmp_path: Path, small_dir: Path) -> None:
    check(member, tmp_path, small_dir)
    assert not _sent(Place(tmp_path, small_dir))


def test_rows_on_a_terminal_are_the_same_json(tmp_path: Path, small_dir: Path) -> None:
    place = Place(tmp_path, small_dir)
    ended: Any = run(_file("encode", "a\u202e[b]", place), place)
    assert ended.out.count("\n") == 8 and '"a\\u202e[b].jsonl:1"' in ended.out.replace(
        str(tmp_path) + "/", ""
    )
