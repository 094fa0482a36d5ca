"""Text is held back until it is whole."""

from __future__ import annotations

from qwen_ds.decode.text import TextStream


def byte(index: int) -> bytes:
    return bytes([index])


def test_a_character_shows_once_all_its_bytes_are_there() -> None:
    stream = TextStream(byte)
    shown = [stream.push(index) for index in "a裙子".encode()]
    assert shown == ["a", "", "", "裙", "", "", "子"]
    assert stream.finish() == ""


def test_half_a_character_at_the_end_is_the_readers_choice() -> None:
    for errors, rest in (("replace", "\ufffd"), ("ignore", "")):
        stream = TextStream(byte, errors)  # type: ignore[arg-type]
        assert "".join(stream.push(index) for index in "裙子".encode()[:-1]) == "裙"
        assert stream.finish() == rest


def test_bytes_that_can_no_longer_become_a_character_are_not_held_back() -> None:
    stream = TextStream(byte)
    assert [stream.push(index) for index in b"\xe8a"] == ["", "\ufffda"]
