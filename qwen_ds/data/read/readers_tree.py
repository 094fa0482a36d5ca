"""Open Assistant: trees of messages, as one row per tree or as one row per message.

Every path from the root to a leaf is a conversation, depth first. Deleted messages and their
replies are left out. A leaf that is a question has no answer: its path is cut there, and of such
siblings, whose paths are the same up to the cut, only the first gives one, as in Open Assistant's
training code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qwen_ds.data.read.dialogue import (
    NO_QUESTION,
    Dropped,
    Outcome,
    Row,
    dialogue_of,
    list_of,
    object_of,
    text_of,
)
from qwen_ds.data.read.readers_turns import SHAREGPT_ROLES, role_of

NOT_READY = "tree is not ready for export"
NO_PARENT = "parent message is missing"


@dataclass(frozen=True, slots=True)
class Message:
    """One node. `source` is its row's, "" when the whole tree is one row."""

    role: str
    text: str
    deleted: bool
    replies: list[Message] = field(default_factory=list)
    source: str = ""


@dataclass(slots=True)
class MessageTrees:
    """Rows of single messages, put together into their trees in memory."""

    by_id: dict[str, Message] = field(default_factory=dict)
    roots: list[tuple[Message, bool]] = field(default_factory=list)
    waiting: list[tuple[str, Message]] = field(default_factory=list)

    def add(self, row: Row, source: str) -> None:
        message = _message(row, source)
        self.by_id[text_of(row, "message_id")] = message
        parent = text_of(row, "parent_id")
        if parent:
            self.waiting.append((parent, message))
        else:
            self.roots.append((message, _is_ready(row)))

    def outcomes(self) -> Iterator[tuple[Outcome, str]]:
        """The outcomes of all trees in the order of their roots, each with its last source."""
        orphans: list[Message] = []
        for parent, message in self.waiting:
            siblings = self.by_id[parent].replies if parent in self.by_id else orphans
            siblings.append(message)
        for root, ready in self.roots:
            yield from _outcomes(root, ready)
        for message in orphans:
            yield Dropped(NO_PARENT), message.source


def read_tree(row: Row) -> list[Outcome]:
    """One tree: {message_tree_id, tree_state, prompt: {text, role, deleted, replies: [..]}}."""
    root = _nested(object_of(row["prompt"], "prompt"))
    return [outcome for outcome, _ in _outcomes(root, _is_ready(row))]


def _is_ready(row: Row) -> bool:
    return row.get("tree_state") in (None, "ready_for_export")


def _message(row: Row, source: str = "") -> Message:
    role = role_of(row.get("role"), SHAREGPT_ROLES, "prompter, assistant", "role")
    return Message(role, text_of(row, "text"), row.get("deleted") is True, [], source)


def _nested(prompt: Row) -> Message:
    root = _message(prompt)
    open_nodes: list[tuple[Row, Message]] = [(prompt, root)]
    while open_nodes:
        row, message = open_nodes.pop()
        for value in list_of(row, "replies"):
            reply = object_of(value, "a reply")
            message.replies.append(_message(reply))
            open_nodes.append((reply, message.replies[-1]))
    return root


def _outcomes(root: Message, ready: bool) -> Iterator[tuple[Outcome, str]]:
    if not ready or root.deleted:
        yield Dropped(NO_QUESTION if ready else NOT_READY), root.source
        return
    # (path, whether its last message is a first sibling)
    paths: list[tuple[tuple[Message, ...], bool]] = [((root,), True)]
    while paths:
        path, is_first = paths.pop()
        replies = [reply for reply in path[-1].replies if not reply.deleted]
        if replies:
            paths += reversed([((*path, reply), place == 0) for place, reply in enumerate(replies)])
        elif path[-1].role == "assistant" or is_first:
            turns = ((message.role, message.text) for message in path)
            yield dialogue_of(turns, None), path[-1].source
