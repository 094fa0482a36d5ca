"""The turns of a chat, and the file that they are saved to."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ds.data.read.sources import iter_conversations
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn
from serve.talk.history import History


def test_what_is_saved_is_what_training_reads(tmp_path: Path) -> None:
    history = History("短")
    history.add("你好", "\x1b[31m您好\u2028")
    history.add("q", "a")
    history.save(tmp_path / "chat.json")
    (found,) = [found for found, _ in iter_conversations([str(tmp_path / "chat.json")])]
    assert isinstance(found, Conversation) and found.system == "短"
    assert [(turn.role, turn.text) for turn in found.turns] == [
        ("user", "你好"),
        ("assistant", "\x1b[31m您好\u2028"),
        ("user", "q"),
        ("assistant", "a"),
    ]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    history, taken = History(), tmp_path / "taken"
    with pytest.raises(UserError, match="nothing to save"):
        history.save(taken)
    history.add("q", "a")
    taken.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("taken", "link", "."):
        with pytest.raises(UserError, match="exists; expected a new name"):
            history.save(tmp_path / name)
    with pytest.raises(UserError, match="a file; expected a folder"):
        history.save(taken / "chat.json")
    assert taken.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_the_last_exchange_is_taken_back() -> None:
    history = History()
    history.add("q", "a")
    history.add("r", "b")
    assert history.take_back() == "r"
    assert [turn.text for turn in history.asking("s").turns] == ["q", "a", "s"]
    assert history.asking("s").turns[-1] == Turn("user", "s")
