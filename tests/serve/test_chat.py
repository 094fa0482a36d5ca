"""The command: over a pipe, on a pseudo-terminal, and with a server."""

from __future__ import annotations

import json
import os
import pty
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen_ds.data.read.sources import iter_conversations
from qwen_ds.errors import UserError
from qwen_ds.recipe.parser import parse_options
from qwen_ds.terminal import visible
from serve.talk.options import ChatOptions
from tests.jobs import ROOT, fork
from tests.serve.engine.test_adapters import make_adapter
from tests.serve.scripted_server import Body, Handler, answer_to, closed_url, scripted

pytestmark = pytest.mark.job


def asked(text: str) -> str:
    """What the scripted server answers."""
    return answer_to({"messages": [{"content": text}]})


def _chat(words: list[str], stdin: str, out: str, err: str) -> None:
    """In the child: the command with these files, or one terminal, as its streams."""
    os.setsid()  # the terminal that is opened first is then the one whose Ctrl-C comes here
    for path, descriptor in ((stdin, 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (
        os.fdopen(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2)
    )
    os.environ.pop("PYTHONSTARTUP", None)
    os.environ["TERM"] = "dumb"
    import torch

    torch.set_num_threads(1)
    sys.argv = ["chat", *words]
    runpy.run_path(str(ROOT / "serve" / "chat.py"), run_name="__main__")


def piped(words: list[str], text: bytes, place: Path) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of a chat whose entries come from a file."""
    names = [place / name for name in ("in", "out", "err")]
    for name in names:
        name.write_bytes(text if name.name == "in" else b"")
    process = fork(_chat, words, *map(str, names))
    process.join(120)
    process.kill()
    return process.exitcode, names[1].read_text(), names[2].read_text()


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, words: list[str]) -> None:
        self.screen = b""
        self._ours, theirs = pty.openpty()
        name = os.ttyname(theirs)
        self._process = fork(_chat, words, name, name, name)
        os.set_blocking(self._ours, False)
        self._theirs = theirs
        self.until("> ")

    def until(self, pattern: str, seconds: float = 30.0) -> str:
        """Wait for this; all that came before and with it, and is then taken."""
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen.decode(errors="replace"))):
            assert time.monotonic() < ends, f"no {pattern!r} in {self.screen!r}"
            try:
                self.screen += os.read(self._ours, 65536)
            except OSError:  # nothing there
                time.sleep(0.01)
        text = self.screen.decode(errors="replace")
        self.screen = text[found.end() :].encode()
        return text[: found.end()]

    def enter(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def code(self) -> int | None:
        self._process.join(60)
        self._process.kill()
        for descriptor in (self._ours, self._theirs):
            os.close(descriptor)
        return self._process.exitcode


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    yield lambda *words: Terminal(list(words))


def test_each_line_of_a_pipe_gets_its_answer_and_nothing_else(
    small_dir: Path, tmp_path: Path
) -> None:
    words = ["--model", str(small_dir), "--max_new_tokens", "6"]
    saved = tmp_path / "chat.json"
    code, out, err = piped(words, f"你好\n\n再见\n/save {saved}\n".encode(), tmp_path)
    assert code == 0, err
    (conversation,) = [found for found, _ in iter_conversations([str(saved)])]
    answers = [turn.text for turn in conversation.turns if turn.role == "assistant"]
    assert [turn.text for turn in conversation.turns[::2]] == ["你好", "再见"]
    assert len(answers) == 2 and all(answers)
    assert out == "".join(f"{visible(answer)}\n" for answer in answers)
    assert "> " not in out and "room for 512 tokens" in err
    assert re.search(r"room for [\d,]+ tokens of keys and values \([\d.e+]+ GB\)", err)


def test_adapters_are_named_and_changed(small_dir: Path, tmp_path: Path) -> None:
    folders = [
        make_adapter(small_dir, tmp_path / name, {"target_modules": ["c_attn"]}, seed)
        for seed, name in enumerate(("zh", "law"))
    ]
    named = ["--adapter", *(f"{folder.name}={folder}" for folder in folders)]
    words = ["--model", str(small_dir), "--max_new_tokens", "6"]
    entries = b"abc\n/clear\n/adapter law\nabc\n/clear\n/adapter base\nabc\n"
    code, out, err = piped([*words, *named], entries, tmp_path)
    assert code == 0, err
    assert "adapter: zh (of zh, law, base)" in err and "adapter: law (of" in err
    alone = [
        piped([*words, *more], b"abc\n", tmp_path)[1]
        for more in (*(("--adapter", str(folder)) for folder in folders), ())
    ]
    assert out == "".join(alone) and len(set(alone)) == 3
    code, out, err = piped([*words, "--adapter", "a=b", "a=c"], b"", tmp_path)
    assert (code, out) == (2, "") and "two adapters are named a" in err


def test_a_pipe_ends_at_the_first_mistake(small_dir: Path, tmp_path: Path) -> None:
    words = ["--model", str(small_dir), "--max_new_tokens", "6"]
    for text, message in (
        (b"/sav x\n", "/sav: no such command"),
        (b"\xff\xfe\n", "standard input:1: not UTF-8"),
        (b"x" * 900 + b"\n", "the prompt has .* tokens; expected at most 506"),
    ):
        code, out, err = piped(words, text + b"later\n", tmp_path)
        assert (code, out) == (2, "") and re.search(f"error: {message}", err), err
    _, url = closed_url()
    with scripted(lambda h, b, n: h.reply(401, {}) is None) as server:
        code, out, err = piped(["--endpoint", server.url], b"x\n", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1) and "answered 401" in err


def test_a_server_answers_the_whole_conversation(tmp_path: Path) -> None:
    with scripted() as server:
        words = ["--endpoint", server.url, "--system", "short", "--max_new_tokens", "9"]
        code, out, err = piped(words, "你好\n再见\n".encode(), tmp_path)
        assert code == 0, err
        assert out == f"{asked('你好')}\n{asked('再见')}\n"
        assert [(m["role"], m["content"]) for m in server.bodies[1]["messages"]] == [
            ("system", "short"),
            ("user", "你好"),
            ("assistant", asked("你好")),
            ("user", "再见"),
        ]
        assert server.bodies[1]["max_tokens"] == 9


def test_an_escape_sequence_that_is_cut_over_chunks_is_shown_and_not_sent(tmp_path: Path) -> None:
    def coloured(handler: Handler, body: Body, _: int) -> bool:
        if body:
            handler.stream(["a\x1b", "[31mred\x1b]0;t", "itle\x07\x9b", "2J\u202e"], "stop")
        return bool(body)

    with scripted(coloured) as server:
        code, out, _ = piped(["--endpoint", server.url], b"x\n", tmp_path)
    assert code == 0
    assert out == "a␛[31mred␛]0;title␇\\x9b2J\\u202e\n"


def test_prompts_too_long_for_a_server_lose_their_oldest_exchanges(tmp_path: Path) -> None:
    def short(handler: Handler, body: Body, _: int) -> bool:
        is_long = bool(body) and len(body["messages"]) > 4
        if is_long:
            handler.reply(400, {"error": {"message": "maximum context length is 99 tokens"}})
        return is_long

    with scripted(short) as server:
        code, out, err = piped(["--endpoint", server.url], b"a\nb\nc\n", tmp_path)
        assert [m["content"] for m in server.bodies[-1]["messages"][1:]] == ["b", asked("b"), "c"]
    assert (code, out.count("\n")) == (0, 3) and "its 1 oldest exchanges are left out" in err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    terminal: Callable[..., Terminal], small_dir: Path, tmp_path: Path
) -> None:
    chat = terminal("--model", str(small_dir), "--max_new_tokens", "400")
    chat.enter("abc de\r")
    chat.until(r"abc de\r\n.{20}")
    chat.enter("\x03")
    said = chat.until("stopped\r\n> ")
    assert len(said) < 400
    saved = tmp_path / "chat.json"
    chat.enter(f"/save {saved}\r")
    chat.until("(?s)saved: .*> ")
    turns = json.loads(saved.read_text())[0]["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]
    assert 0 < len(turns[2]["content"]) < 400
    before = saved.read_bytes()
    chat.enter(f"/save {saved}\r")
    chat.until("(?s)error: .*exists; expected a new name\r\n> ")
    assert saved.read_bytes() == before
    chat.enter("\x04")
    assert chat.code() == 0


def test_ctrl_c_twice_at_an_empty_prompt_ends_the_chat(terminal: Callable[..., Terminal]) -> None:
    with scripted() as server:
        chat = terminal("--endpoint", server.url)
        chat.enter("half a line")
        chat.until("half a line")
        chat.enter("\x03")
        assert "once more" not in chat.until("> ")
        chat.enter("whole\r")
        assert asked("whole") in chat.until("回答[^>]*\r\n> ")
        assert [m["content"] for m in server.bodies[0]["messages"][1:]] == ["whole"]
        chat.enter("\x03")
        chat.until("once more, or Ctrl-D, ends the chat\r\n> ")
        chat.enter("\x03")
        chat.until("stopped by SIGINT")
        assert chat.code() == 130


def test_ctrl_c_stops_a_server_that_says_nothing(terminal: Callable[..., Terminal]) -> None:
    def silent(handler: Handler, body: Body, tries: int) -> bool:
        if body and tries == 0:
            time.sleep(5)
        return False

    with scripted(silent) as server:
        chat = terminal("--endpoint", server.url)
        chat.enter("hello\r")
        while not server.bodies:
            time.sleep(0.01)
        chat.enter("\x03")
        chat.until("stopped before the first word; /retry asks again\r\n> ", seconds=4)
        chat.enter("/retry\r")
        assert asked("hello") in chat.until("回答[^>]*\r\n> ")
        assert len(server.bodies[-1]["messages"]) == 2
        chat.enter("/exit\r")
        assert chat.code() == 0


def test_commands_on_a_terminal(terminal: Callable[..., Terminal]) -> None:
    with scripted() as server:
        chat = terminal("--endpoint", server.url)
        for entry, shows in (
            ("one\r", asked("one")),
            ("two\r", asked("two")),
            ("/retry\r", asked("two")),
            ("/system be brief\r", ""),
            ("/clear\r", "cleared"),
            ("first\\\rsecond\r", asked("first\nsecond")[:11]),
            ("//etc\r", asked("/etc")),
            ("/unknown\r", "/unknown: no such command"),
            ("/clear it\r", "expected nothing after /clear"),
            ("/help\r", "/save FILE"),
        ):
            chat.enter(entry)
            chat.until(f"{re.escape(shows)}[^>]*\r\n> " if shows else "> ")
        chat.enter("\x04")
        assert chat.code() == 0
        contents = [[m["content"] for m in body["messages"]] for body in server.bodies]
    default = "You are a helpful assistant."
    assert contents[2] == contents[1] == [default, "one", asked("one"), "two"]
    assert contents[3] == ["be brief", "first\nsecond"]
    assert contents[4] == ["be brief", "first\nsecond", asked("first\nsecond"), "/etc"]


def test_a_chat_ends_by_a_signal_at_once(terminal: Callable[..., Terminal]) -> None:
    with scripted() as server:
        chat = terminal("--endpoint", server.url)
        subprocess.run(["kill", "-TERM", str(chat._process.pid)], check=True)
        chat.until("stopped by SIGTERM")
        assert chat.code() == 143


def test_options_are_checked() -> None:
    def parse(*words: str) -> ChatOptions:
        return parse_options(ChatOptions, "", list(words))

    options = parse("--model", "m", "--do_sample", "--memory_gb", "2")
    assert (options.max_new_tokens, options.memory_gb, options.top_k) == (512, 2.0, 50)
    for words, message in (
        ((), "no model given"),
        (("--endpoint", "u", "--memory_gb", "1"), "--memory_gb is for a model here"),
        (("--endpoint", "u", "--adapter", "a=b"), "--adapter is for a model here"),
        (("--model", "m", "--top_p", "2"), "top_p is 2.0"),
        (("--model", "m", "--batch_size", "2"), "unknown option batch_size"),
    ):
        with pytest.raises(UserError, match=message):
            parse(*words)
