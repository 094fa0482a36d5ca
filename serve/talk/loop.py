"""The loop of a chat: entries in, answers and words about them out."""

from __future__ import annotations

from pathlib import Path

from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.errors import Failed, UserError
from qwen_ds.signals import Stopped
from qwen_ds.terminal import one_line, show
from serve.endpoint.wire import Trouble
from serve.talk.history import History
from serve.talk.interrupts import Interrupts
from serve.talk.lines import LineSource, read_entry
from serve.talk.talkers import Talker

HELP = """\
/clear         forget the conversation
/system TEXT   use another system text from now on; without TEXT: show it
/adapter NAME  answer by this adapter from now on; without NAME: list them
/retry         answer the last question once more
/save FILE     write the conversation as JSON messages, a row that training reads
/help          show this
/exit          end, as Ctrl-D does
A backslash at the end of a line continues it. Ctrl-C stops an answer. A question that begins with
/ is entered with //."""


class Chat:
    """A conversation under way.

    On a terminal a mistake is told and the chat goes on; in a pipe it ends the command.
    """

    def __init__(
        self,
        talker: Talker,
        history: History,
        lines: LineSource,
        interrupts: Interrupts,
        on_terminal: bool,
    ) -> None:
        self.history = history
        self._talker, self._lines, self._interrupts = talker, lines, interrupts
        self._on_terminal = on_terminal
        self._failed: str | None = None  # a question that has got no answer
        self._left_out = 0

    def run(self) -> None:
        """Answer until there are no more entries."""
        while (entry := read_entry(self._lines)) is not None:
            if entry.strip() == "/exit":
                return
            try:
                self._take(entry)
            except (UserError, Failed) as error:
                if not self._on_terminal:
                    raise
                show(f"error: {one_line(error)}", err=True)

    def _take(self, entry: str) -> None:
        """Act on one entry: a command or a question."""
        if entry.startswith("//"):
            self._ask(entry[1:])
        elif entry.startswith("/"):
            name, _, rest = entry.partition(" ")
            self._command(name.strip(), rest.strip())
        elif entry.strip():
            self._ask(entry)

    def _command(self, name: str, rest: str) -> None:
        history = self.history
        if name in ("/clear", "/retry", "/help", "/exit") and rest:
            raise UserError(f"{name} {rest}: expected nothing after {name}")
        match name:
            case "/clear":
                history.turns.clear()
                self._failed, self._left_out = None, 0
                self._tell("cleared")
            case "/system" if rest:
                history.system = rest
            case "/system":
                self._tell(f"system: {history.asking('').system or 'the default one'}")
            case "/adapter":
                self._tell(self._talker.use_adapter(rest))
            case "/retry":
                self._retry()
            case "/save":
                if not rest:
                    raise UserError("/save: no name; expected /save FILE")
                history.save(Path(rest).expanduser())
                self._tell(f"saved: {rest}")
            case "/help":
                self._tell(HELP)
            case _:
                raise UserError(
                    f"{name}: no such command; expected one that /help lists, or // before a "
                    "question that begins with /"
                )

    def _retry(self) -> None:
        if self._failed is None and not self.history.turns:
            raise UserError("/retry: nothing was asked; expected a question before")
        if self._failed is not None:
            self._ask(self._failed)
            return
        kept = self.history.turns[-2:]
        try:
            self._ask(self.history.take_back())
        finally:
            if self._failed is not None:  # there is no other answer: the old one stays
                self.history.turns += kept
                self._failed = None

    def _ask(self, question: str) -> None:
        """Print an answer as it comes, and keep what has come of it, however it ends."""
        said: list[str] = []
        self._failed = question
        self._interrupts.take()
        try:
            reason = self._print_reply(question, said)
        except (DecodingError, Trouble) as error:
            raise UserError(str(error)) from None
        except Stopped:  # another signal, or Ctrl-C in a pipe
            raise
        except KeyboardInterrupt:
            reason = "interrupt"
        finally:
            if said:
                show("")
            if answer := "".join(said):
                self.history.add(question, answer)
                self._failed = None
        if reason == "interrupt":
            self._tell("stopped" if said else "stopped before the first word; /retry asks again")
        elif reason == "length":
            self._tell("cut at the most new tokens that there may be (--max_new_tokens)")
        elif not said:  # the model has nothing to say, which is an answer
            show("")
            self.history.add(question, "")
            self._failed = None

    def _print_reply(self, question: str, said: list[str]) -> str | None:
        """Print an answer, and gather its text in `said`; how it ended."""
        reason = None
        pieces = self._talker.reply(self.history.asking(question))
        for piece in pieces:
            if piece.left_out and piece.left_out != self._left_out:
                self._tell(
                    f"the conversation no longer fits the context: its {piece.left_out} oldest "
                    "exchanges are left out"
                )
            self._left_out = piece.left_out or self._left_out
            if piece.text:
                said.append(piece.text)
                show(piece.text, end="")
            reason = piece.finish_reason or reason
            if self._interrupts.came:
                pieces.close()
                raise KeyboardInterrupt
        return reason

    def _tell(self, text: str) -> None:
        """Say something that is no answer: not on stdout, where a pipe's reader takes answers."""
        show(text, err=True)
