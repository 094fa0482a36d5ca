"""Text of a growing answer: nothing of a stop shows, and the pieces are the answer."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qwen_ds.decode.answer_text import AnswerText
from qwen_ds.decode.stop import StopRule

# A token is a byte here; Chinese characters have three.
TEXT = "a观察ab观b"
TOKENS = list(TEXT.encode())


def pieces(text: AnswerText, tokens: list[int], min_tokens: int = 0) -> list[str]:
    """As the engine pushes them: it ends at the first stop."""
    shown = []
    for i, token in enumerate(tokens):
        shown.append(text.push(token, may_end=i >= min_tokens))
        if text.is_stopped:
            break
    return [*shown, text.finish()]


def make(stop: StopRule, strings: tuple[str, ...] = ()) -> AnswerText:
    return AnswerText(lambda token: bytes([token]), stop, strings)


def grown(stop: StopRule, strings: tuple[str, ...] = (), min_tokens: int = 0) -> list[str]:
    return pieces(make(stop, strings), TOKENS, min_tokens)


def test_pieces_are_whole_characters_and_together_the_answer() -> None:
    found = grown(StopRule())
    assert "".join(found) == TEXT
    assert all("\ufffd" not in piece for piece in found)


@pytest.mark.parametrize("length", range(1, 8))
def test_no_byte_of_a_stop_sequence_shows(length: int) -> None:
    """Every sequence that is there, wherever it begins, ends the text just before it."""
    for start in range(1, len(TOKENS) - length + 1):
        sequence = tuple(TOKENS[start : start + length])
        stop = StopRule(sequences=(sequence,))
        kept, reason = stop.cut(TOKENS)
        assert reason == "stop"
        assert "".join(grown(stop)) == bytes(kept).decode(errors="replace")


def test_a_sequence_that_only_begins_is_text() -> None:
    stop = StopRule(sequences=((ord("a"), ord("b"), ord("c")), (ord("b"), 1)))
    assert "".join(grown(stop)) == TEXT


def test_stops_of_all_kinds_work_side_by_side() -> None:
    rng = random.Random(3)
    for _ in range(200):
        start = rng.randrange(1, len(TEXT))
        string = TEXT[start : start + rng.randrange(1, 4)]
        stop = StopRule(ids=(rng.choice(TOKENS[3:]),), sequences=((ord("a"), ord("b")),))
        by_tokens = bytes(stop.cut(TOKENS)[0]).decode(errors="ignore")
        found = "".join(grown(stop, (string,)))
        assert found.rstrip("\ufffd") == by_tokens.partition(string)[0]


def test_text_that_was_held_back_may_complete_a_stop_string_at_the_end() -> None:
    """It was held back as the beginning of a stop sequence, or of a longer stop string, or for the
    rest of a character."""
    sequence = StopRule(sequences=((ord("b"), ord("c")),))
    for stop, strings, tokens, shown in (
        (sequence, ("ab",), b"xab", "x"),
        (sequence, ("b",), b"xab", "xa"),
        (sequence, ("c",), b"xab", "xab"),
        (StopRule(), ("b\ufffd",), "xb裙".encode()[:3], "x"),
        (StopRule(), ("b", "abc"), b"xab", "xa"),
    ):
        text = make(stop, strings)
        assert "".join(pieces(text, list(tokens))) == shown
        assert text.is_stopped == (shown != "xab")
        assert text.stop_tokens == 0


def test_the_tokens_of_a_stop_are_counted() -> None:
    for stop, count in (
        (StopRule(ids=(ord("b"),)), 1),
        (StopRule(sequences=((ord("b"),), (ord("a"), ord("b")))), 2),
        (StopRule(sequences=((ord("b"), ord("c")),)), 0),
    ):
        text = make(stop)
        found = pieces(text, list(b"xab"))
        assert "".join(found) == "xab"[: 3 - count]
        assert text.stop_tokens == count and text.is_stopped == (count > 0)


def test_a_stop_sequence_does_not_begin_before_min_tokens() -> None:
    stop = StopRule(sequences=((ord("b"), ord("c")),))
    for min_tokens, shown in ((0, "a"), (1, "a"), (2, "abca"), (3, "abca"), (5, "abcabc")):
        assert "".join(pieces(make(stop), list(b"abcabc"), min_tokens)) == shown


def test_before_min_tokens_a_stop_string_is_text() -> None:
    assert "".join(grown(StopRule(), ("a",))) == ""
    assert "".join(grown(StopRule(), ("a",), min_tokens=1)) == "a观察"
    assert "".join(grown(StopRule(), ("a",), min_tokens=99)) == TEXT


def test_a_stop_id_is_no_text() -> None:
    stop = replace(StopRule(), ids=(ord("b"),))
    assert "".join(grown(stop)) == "a观察a"
