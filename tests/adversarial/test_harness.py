"""The harness itself: what it must notice."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.adversarial.harness import Member, Place, check


def _encode(place: Place, output: str = "out/rows.jsonl") -> Sequence[str | Path]:
    base, rows = place.base(), place.rows()
    return [
        "data", "encode", "--model.path", base, "--data.train", rows,
        "--output", place.here / output,
    ]  # fmt: skip


def test_a_right_command_passes(tmp_path: Path, small_dir: Path) -> None:
    member = Member("right", _encode, code=0, leaves=lambda place: any(place.out.iterdir()))
    check(member, tmp_path, small_dir)


def test_one_line_and_exit_code_2_pass(tmp_path: Path, small_dir: Path) -> None:
    check(
        Member("typo", lambda _: ["plan", "--optm.lr", "1"], says=("optim.lr",)),
        tmp_path,
        small_dir,
    )


@pytest.mark.parametrize(
    ("member", "noticed"),
    [
        (Member("another code", lambda _: ["plan", "--optm.lr", "1"], code=1), "exit 2"),
        (Member("other words", lambda _: ["plan", "--optm.lr", "1"], says=("xyz",)), "is not said"),
        (
            Member("a file outside", lambda place: _encode(place, "rows2.jsonl"), code=0),
            "rows2.jsonl",
        ),
        (
            Member(
                "an import", lambda place: [place.file("imported"), *_encode(place)][1:], code=0
            ),
            "planted module",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Member) else "",
)
def test_whatever_goes_wrong_is_noticed(
    member: Member, noticed: str, tmp_path: Path, small_dir: Path
) -> None:
    with pytest.raises(AssertionError, match=noticed):
        check(member, tmp_path, small_dir)


def test_a_command_that_computes_without_end_is_noticed(tmp_path: Path, small_dir: Path) -> None:
    member = Member("endless", lambda place: [place.file("endless.py", "while True: pass")], code=0)
    with pytest.raises(AssertionError, match=f"exit -{signal.SIGXCPU}"):
        check(member, tmp_path, small_dir, cpu_seconds=1)
