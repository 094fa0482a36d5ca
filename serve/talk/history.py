"""The turns of a chat: kept, taken back, saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qwen_ds.disk.place import require_folder
from qwen_ds.disk.write import write_json
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn, turns_of


@dataclass(slots=True)
class History:
    """Exchanges of question and answer under a system text (None: the default one)."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def asking(self, question: str) -> Conversation:
        """The whole chat with a new question at its end."""
        return Conversation(self.system, (*self.turns, Turn("user", question)))

    def add(self, question: str, answer: str) -> None:
        self.turns += [Turn("user", question), Turn("assistant", answer)]

    def take_back(self) -> str:
        """Remove the last exchange; its question."""
        question, _ = self.turns[-2:]
        del self.turns[-2:]
        return question.text

    def save(self, file: Path) -> None:
        """Write the chat as one row of messages, which training reads. UserError: nothing to write,
        a file of this name, or a place that cannot be written."""
        if not self.turns:
            raise UserError("nothing to save; expected at least one answer")
        if file.exists() or file.is_symlink():
            raise UserError(f"{file}: exists; expected a new name")
        require_folder(file.absolute().parent)
        turns = turns_of(Conversation(self.system, tuple(self.turns)))
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            write_json(file, [{"messages": messages}])
        except OSError as error:
            raise UserError(
                f"{file}: {error.strerror or error}; expected a file to write"
            ) from None
