"""ChatML: the one source of it for training rows, prompts, the chat template and the API.

A turn is `<|im_start|>role\\ntext<|im_end|>\\n`. The control tokens are put in as ids and the text
between them is encoded by itself, so a text that spells `<|im_end|>` stays text: it cannot close
its turn and open another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from qwen_ds.errors import UserError
from qwen_ds.model.tokenizer import IM_END, IM_START, Encoding

IGNORE = -100  # the label of a token that is no target: torch's cross_entropy leaves it out
DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")

# The same text as a Jinja template, which travels with a saved tokenizer for other engines. They
# encode the finished text, so there a control token spelled in a message becomes a real one.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; in a Conversation, which keeps its system text apart, never a system's."""

    role: str
    text: str
    learnt: bool = True  # False: training leaves the whole turn out of its targets


@dataclass(frozen=True, slots=True)
class Conversation:
    """A system text (None: the default one) and alternating turns, the user's first."""

    system: str | None
    turns: tuple[Turn, ...]
    system_learnt: bool = True  # as `Turn.learnt`; of a system turn only `official` learns anything


# [{"role": .., "content": ..}, ...], as chat templates and HTTP APIs have it.
Messages = Sequence[Mapping[str, object]]


def turns_of(conversation: Conversation | Messages) -> list[Turn]:
    """All turns, the system turn first; without one it is DEFAULT_SYSTEM. UserError: a message
    without a role of ROLES, or without a content that is a string or a list of
    {"type": "text", "text": ..} parts (which are joined without a separator)."""
    if isinstance(conversation, Conversation):
        given = DEFAULT_SYSTEM if conversation.system is None else conversation.system
        return [Turn("system", given), *conversation.turns]
    turns = [_turn(message, place) for place, message in enumerate(conversation)]
    if not turns:
        raise UserError("the chat is empty; expected at least one message")
    return turns if turns[0].role == "system" else [Turn("system", DEFAULT_SYSTEM), *turns]


def _turn(message: object, place: int) -> Turn:
    if not isinstance(message, Mapping):
        came = type(message).__name__
        raise UserError(f"messages[{place}] is {came}; expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(
            f"messages[{place}].role is {role!r:.80}; expected one of {', '.join(ROLES)}"
        )
    return Turn(str(role), text_of(content, place))


def text_of(content: object, place: int) -> str:
    """The text of messages[place]; UserError: it is none."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [
        part.get("text")
        if isinstance(part, Mapping) and part.get("type", "text") == "text"
        else None
        for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"messages[{place}].content is not text; expected a string or a list of text parts"
        )
    return "".join(map(str, texts))


def text_ids(enc: Encoding, text: str, parse_specials: bool = False) -> list[int]:
    """Ids of a text: with no control token among them, unless `parse_specials` parses them."""
    return enc.with_specials(text) if parse_specials else enc.ordinary(text)


@lru_cache(maxsize=64)
def header_ids(enc: Encoding, role: str) -> tuple[int, ...]:
    """`<|im_start|>role\\n`, the ids before a turn's text."""
    return (enc.im_start_id, *enc.ordinary(role), *enc.ordinary("\n"))


@lru_cache(maxsize=8)
def footer_ids(enc: Encoding) -> tuple[int, ...]:
    """`<|im_end|>\\n`, the ids after a turn's text."""
    return (enc.im_end_id, *enc.ordinary("\n"))


def turn_ids(enc: Encoding, role: str, text: str, parse_specials: bool = False) -> list[int]:
    """Ids of a whole turn; role, line breaks and text are encoded separately."""
    return [*header_ids(enc, role), *text_ids(enc, text, parse_specials), *footer_ids(enc)]


def encode_turns(
    enc: Encoding,
    turns: Sequence[Turn],
    add_generation_prompt: bool = False,
    continue_final_turn: bool = False,
    parse_specials: bool = False,
) -> list[int]:
    """Ids of the turns one after another, then of `<|im_start|>assistant\\n` if it is asked for;
    `continue_final_turn` leaves the last turn open after its text instead."""
    ids = [token for turn in turns for token in turn_ids(enc, turn.role, turn.text, parse_specials)]
    if continue_final_turn:
        return ids[: -len(footer_ids(enc))]
    return [*ids, *header_ids(enc, "assistant")] if add_generation_prompt else ids


def render_turns(
    turns: Sequence[Turn], add_generation_prompt: bool = False, continue_final_turn: bool = False
) -> str:
    """The text of `encode_turns`; control tokens spelled in a turn look like real ones here."""
    text = "".join(f"{IM_START}{turn.role}\n{turn.text}{IM_END}\n" for turn in turns)
    if continue_final_turn:
        return text.removesuffix(f"{IM_END}\n")
    return f"{text}{IM_START}assistant\n" if add_generation_prompt else text


def encode_prompt(
    enc: Encoding, conversation: Conversation | Messages, parse_specials: bool = False
) -> list[int]:
    """Ids of a prompt: every turn, then `<|im_start|>assistant\\n`. Texts are not stripped: the ids
    are the official make_context's."""
    turns = turns_of(conversation)
    return encode_turns(enc, turns, add_generation_prompt=True, parse_specials=parse_specials)
