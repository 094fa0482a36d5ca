"""Entries in, answers out: what is kept when an answer fails, breaks off or is empty."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation
from serve.endpoint.wire import EndpointRefused, Trouble
from serve.talk.history import History
from serve.talk.interrupts import Interrupts
from serve.talk.loop import Chat
from serve.talk.talkers import Piece, Replies


class Entries:
    """Lines from a list."""

    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)

    def line(self, prompt: str) -> str | None:
        return self._lines.pop(0) if self._lines else None


class Script:
    """A talker that says what it is told; an exception is raised."""

    def __init__(self, *answers: Sequence[str | Exception]) -> None:
        self._answers = list(answers)
        self.asked: list[list[str]] = []

    def reply(self, conversation: Conversation) -> Replies:
        self.asked.append([turn.text for turn in conversation.turns])
        yield Piece()
        for part in self._answers.pop(0):
            if isinstance(part, Exception):
                raise part
            yield Piece(part)
        yield Piece("", "stop")

    def use_adapter(self, name: str) -> str:
        if name == "no":
            raise UserError("/adapter no: no such adapter")
        return f"adapter: {name or 'zh'}"


def chat(talker: Script, *lines: str, on_terminal: bool = True) -> Chat:
    made = Chat(talker, History(), Entries(*lines), Interrupts(), on_terminal)
    made.run()
    return made


def kept(made: Chat) -> list[str]:
    return [turn.text for turn in made.history.turns]


def test_a_retry_that_fails_leaves_the_answer_that_there_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    talker = Script(["a"], [EndpointRefused("the server is full")], ["b"])
    made = chat(talker, "q", "/retry", "r")
    assert talker.asked == [["q"], ["q"], ["q", "a", "r"]]
    assert kept(made) == ["q", "a", "r", "b"]
    out, err = capsys.readouterr()
    assert (out, err) == ("a\nb\n", "error: the server is full\n")


def test_an_answer_that_breaks_off_is_kept_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    made = chat(Script(["half", Trouble("broke off")]), "q")
    assert kept(made) == ["q", "half"]
    assert capsys.readouterr() == ("half\n", "error: broke off\n")


def test_a_question_without_an_answer_can_be_asked_again() -> None:
    talker = Script([Trouble("down")], ["a"])
    assert kept(chat(talker, "q", "/retry")) == ["q", "a"]
    with pytest.raises(UserError, match="/retry: nothing was asked"):
        chat(Script(), "/retry", on_terminal=False)


def test_an_empty_answer_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert kept(chat(Script([]), "q", on_terminal=False)) == ["q", ""]
    assert capsys.readouterr().out == "\n"


def test_lines_go_on_after_a_backslash() -> None:
    talker = Script(["a"], ["b"])
    chat(talker, "one\\", "two\\", "three", "last\\")
    assert talker.asked == [["one\ntwo\nthree"], ["one\ntwo\nthree", "a", "last"]]


def test_exit_ends_before_later_lines() -> None:
    assert kept(chat(Script(["a"]), "q", "/exit", "never")) == ["q", "a"]


def test_another_adapter_may_go_on_with_the_conversation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = chat(Script(["a"], ["b"]), "q", "/adapter law", "/adapter", "/adapter no", "r")
    assert kept(made) == ["q", "a", "r", "b"]
    said = "adapter: law\nadapter: zh\nerror: /adapter no: no such adapter\n"
    assert capsys.readouterr() == ("a\nb\n", said)
