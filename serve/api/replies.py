"""A reply with functions as it comes: whether it is a call, and its parts as soon as they are sure.

Put together the parts are what `parse_reply` makes of the whole text, but for texts that no model
writes in earnest: what has been sent as content stays content, so a label after it that would have
changed it (a second `Final Answer:`, a `Thought:` behind other text, a call behind an answer) only
changes what follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen_ds.model.react import parse_reply, thought_of

_ACTION, _INPUT, _FINAL = "\nAction:", "\nAction Input:", "\nFinal Answer: "
_OBSERVATION = "\nObservation:"
_THOUGHT = "Thought:"


@dataclass(frozen=True, slots=True)
class ReplyPart:
    """A piece of a reply: content, a call's name, or a piece of its arguments."""

    kind: Literal["content", "name", "arguments"]
    text: str


class ReplyParts:
    """The parts of one reply."""

    def __init__(self, continues_thought: bool = False) -> None:
        """
        Args:
            continues_thought: the prompt ends with `Thought:`, which the reply goes on from.
        """
        self.is_call = False
        self._text = ""
        self._sent = 0  # up to where the text has been sent as content
        self._begin = 0  # of the arguments
        self._holds = continues_thought  # thoughts wait for what they lead to
        self._is_answer = False
        self._arguments = 0  # characters sent
        self._has_looked = False

    def push(self, text: str) -> list[ReplyPart]:
        """Take the next piece of the reply; the parts that are sure by now."""
        self._text += text
        if self.is_call:
            return self._more_arguments(is_end=False)
        if not self._has_looked:
            # Too early to tell whether it begins with a thought.
            start = self._text.lstrip()
            if len(start) < len(_THOUGHT) and _THOUGHT.startswith(start):
                return []
            self._holds = self._holds or start.startswith(_THOUGHT)
            self._has_looked = True
        return self._look()

    def finish(self) -> list[ReplyPart]:
        """The rest, once the reply has ended."""
        if self.is_call:
            return self._more_arguments(is_end=True)
        content, call = parse_reply(self._text)
        assert call is None, "a call shows with its last label"
        if self._sent:
            content = self._text[self._sent :]
        return [ReplyPart("content", content)] if content else []

    def _look(self) -> list[ReplyPart]:
        action, given = self._text.find(_ACTION), self._text.find(_INPUT)
        if 0 <= action < given and self._text[action + len(_ACTION) : given].strip():
            return self._begin_call(action, given)
        if self._holds and not self._is_answer:
            final = self._text.find(_FINAL)
            if final < 0 or 0 <= action < final:
                return []
            self._is_answer, self._sent = True, final + len(_FINAL)
        # What may be the beginning of a label is not sent, nor what stands behind one's beginning.
        end = self._safe_end(action if action >= self._sent else -1)
        if end <= self._sent:
            return []
        part = ReplyPart("content", self._text[self._sent : end])
        self._sent = end
        return [part]

    def _safe_end(self, action: int) -> int:
        if action >= 0:
            return action
        line = self._text.rfind("\n", max(self._sent - 1, 0))
        if line < 0:
            return len(self._text)
        tail = self._text[line:]
        labels = (_ACTION, _INPUT)
        return line if any(label.startswith(tail) for label in labels) else len(self._text)

    def _begin_call(self, action: int, given: int) -> list[ReplyPart]:
        self.is_call, self._begin = True, given + len(_INPUT)
        name = self._text[action + len(_ACTION) : given].strip()
        content = self._text[self._sent : action] if self._sent else thought_of(self._text[:action])
        parts = [ReplyPart("content", content)] if content else []
        return [*parts, ReplyPart("name", name), *self._more_arguments(is_end=False)]

    def _more_arguments(self, is_end: bool) -> list[ReplyPart]:
        observation = self._text.find(_OBSERVATION)
        if 0 <= observation < self._begin:
            return []
        whole = self._text[self._begin : observation if observation >= 0 else len(self._text)]
        whole = whole.lstrip()
        # White space at the end is sent once something follows it.
        sure = whole.rstrip()
        if not is_end and observation < 0:
            line = sure.rfind("\n")
            if line >= 0 and _OBSERVATION.startswith(sure[line:]):
                sure = sure[:line].rstrip()
        part = ReplyPart("arguments", sure[self._arguments :])
        self._arguments = max(self._arguments, len(sure))
        return [part] if part.text else []
