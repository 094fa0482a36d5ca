"""Text on a terminal is shown, never obeyed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import unicodedata

import pytest

from qwen_ds import terminal
from qwen_ds.terminal import json_text, one_line, show, visible

ACTING = [
    "\x00", "\x07", "\x08", "\r", "\x1b]0;title\x07", "\x1b[2J", "\x1b]52;c;eA==\x07", "\x7f",
    "\x85", "\x9b31m", "\u061c", "\u200b", "\u200e", "\u2028", "\u202e", "\u2066", "\u2069",
    "\ufeff", "\ufff9", "\ud800", "\udc9b", "\U000e0041",
]  # fmt: skip


@pytest.mark.parametrize("text", ACTING, ids=ascii)
def test_what_acts_is_spelled_and_the_rest_stays(text: str) -> None:
    shown = visible(f"a{text}b")
    assert shown[0] == "a" and shown[-1] == "b" and text not in shown
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)


def test_words_of_all_scripts_and_lines_stay() -> None:
    text = "你好\tשלום, सत्‍य 👩‍💻 é\n[red]x {a}"
    assert visible(text) == text and one_line(text).count("\n") == 0


@pytest.mark.parametrize("text", ACTING, ids=ascii)
def test_json_for_a_terminal_is_the_same_value(text: str) -> None:
    line = json.dumps({text: [text]}, ensure_ascii=False)
    assert json.loads(json_text(line)) == {text: [text]}
    assert visible(json_text(line)) == json_text(line)


def test_a_stream_that_cannot_encode_gets_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    show("你 \x1b[1m", "é")
    assert raw.getvalue() == b"\\u4f60 \\u241b[1m \\xe9\n"


def test_a_line_that_is_overwritten_is_cleared(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.overwrite_line("a\rb", 3)
    assert capsys.readouterr().out == "\r   \ra␍b"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_guarded_process_holds_back_what_libraries_print(encoding: str) -> None:
    """And the traceback of an error; colours and redrawn bars pass."""
    code = (
        "from qwen_ds.terminal import guard; guard()\n"
        "print('\\x1b]0;x\\x07\\x1b[31m\\r\\u4f60\\x9b');"
        "raise SystemError('\\x1b[2J\\u202e')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": encoding}
    )
    assert ended.returncode == 1 and b"SystemError" in ended.stderr
    assert b"\x1b[31m\r" in ended.stdout and b"\x1b]" not in ended.stdout
    assert b"\x1b" not in ended.stderr and "\u202e".encode() not in ended.stderr
