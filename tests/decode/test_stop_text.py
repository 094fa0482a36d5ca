"""Stop strings on the official vocabulary: none of one shows, and all before it does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qwen_ds.decode.exceptions import InvalidSampling
from qwen_ds.decode.stop_text import StopText
from qwen_ds.decode.text import TextStream
from qwen_ds.model.tokenizer import Encoding, load_encoding

TEXT = "问：裙子😀好看吗？\nObservation: aab👩‍👩‍👧 aabaaac 红\r\n\nThought: é x"


@pytest.fixture(scope="module")
def encoding(vocab_path: Path) -> Encoding:
    return load_encoding(vocab_path)


def byte(index: int) -> bytes:
    return bytes([index])


def chunks_of(watching: StopText, tokens: Sequence[int]) -> list[str]:
    return [*(watching.push(token) for token in tokens), watching.finish()]


def divisions(encoding: Encoding, text: str, chance: random.Random) -> Iterator[list[bytes]]:
    """The text as single bytes, as the model's own tokens, as one piece, and cut anywhere."""
    whole = text.encode()
    yield [byte(value) for value in whole]
    yield [encoding.token_bytes(token) for token in encoding.ordinary(text)]
    yield [whole]
    for _ in range(2):
        cuts = sorted({0, len(whole), *chance.sample(range(len(whole)), 9)})
        yield [whole[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def test_every_stop_string_is_cut_at_each_place(encoding: Encoding) -> None:
    """Of 1 to 12 characters, from each place of a text, over tokens that end anywhere in it."""
    chance, tried = random.Random(3), 0
    for size in range(1, 13):
        for start in range(len(TEXT) - size + 1):
            stop = TEXT[start : start + size]
            before = TEXT[: TEXT.index(stop)]
            for pieces in divisions(encoding, TEXT, chance):
                watching = StopText(TextStream(pieces.__getitem__), [stop])
                chunks = chunks_of(watching, range(len(pieces)))
                assert "".join(chunks) == before and watching.stopped == stop
                tried += 1
    assert tried > 3000


def test_a_stop_string_is_cut_after_each_of_its_characters() -> None:
    """Not one of them shows at any moment, and nothing is held back longer than it must be."""
    for stop in ("Observation:", "裙子", "aab", "👩‍👩‍👧", "\n\n"):
        whole = f"yes{stop}no"
        for cut in range(1, len(stop)):
            pieces = ["yes", stop[:cut], stop[cut:], "no"]
            watching = StopText(TextStream(lambda i, p=pieces: p[i].encode()), [stop])  # type: ignore[misc]
            assert chunks_of(watching, range(4)) == ["yes", "", "", "", ""], whole
            assert watching.stopped == stop


def test_what_turns_out_to_be_no_stop_string_shows_at_once() -> None:
    watching = StopText(TextStream(byte), ["aab", "Observation:"])
    shown = [watching.push(value) for value in b"xaaacObs aa"]
    assert shown == ["x", "", "", "a", "aac", "", "", "", "Obs ", "", ""]
    assert watching.finish() == "aa" and watching.stopped is None
    assert watching.finish() == ""


def test_the_string_that_is_complete_first_ends_the_text_and_the_longest_of_several() -> None:
    for stops, text, before, stopped in (
        (["abcd", "bc"], "xabcd", "xa", "bc"),
        (["c", "abc"], "xabc", "x", "abc"),
        (["abc", "c"], "xabc", "x", "abc"),
        (["裙子", "子"], "红裙子", "红", "裙子"),
    ):
        for pieces in ([text], list(text)):
            watching = StopText(TextStream(lambda i, p=pieces: p[i].encode()), stops)  # type: ignore[misc]
            assert "".join(chunks_of(watching, range(len(pieces)))) == before
            assert watching.stopped == stopped


def test_without_stops_the_chunks_are_the_text(encoding: Encoding) -> None:
    chance = random.Random(8)
    for _ in range(50):
        ids = [chance.randrange(encoding.n_vocab) for _ in range(30)]  # many end inside characters
        for stops in ((), ("no such text",)):
            watching = StopText(TextStream(encoding.token_bytes), stops)
            chunks = chunks_of(watching, ids)
            assert "".join(chunks) == encoding.decode(ids)


def test_half_a_character_at_the_end_comes_after_what_was_held_back() -> None:
    watching = StopText(TextStream(byte), ["abc"])
    shown = [watching.push(value) for value in b"ab\xe8\xa3"]
    assert (shown, watching.finish()) == ([""] * 4, "ab\ufffd")


def test_nothing_comes_after_a_stop() -> None:
    watching = StopText(TextStream(byte), ["b"])
    assert [watching.push(value) for value in b"abcab\xe8"] == ["a", "", "", "", "", ""]
    assert watching.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidSampling, match="stop is .*; expected strings of at least one"):
        StopText(TextStream(byte), ["a", ""])
