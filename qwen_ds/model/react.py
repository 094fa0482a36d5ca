"""Tool calls as Qwen v1 was trained on them: ReAct texts in ChatML turns, and the way back.

The functions are described in a user turn. The model answers with a thought and an action, and the
result of the action comes back as an observation in the same assistant turn. The format is that of
the official server (openai_api.py of QwenLM/Qwen); its deliberate errors are errors here, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Messages, Turn, encode_turns, text_of, turns_of
from qwen_ds.model.tokenizer import Encoding

STOP = "Observation:"  # what the model would go on with by itself after a call

_THOUGHT, _FINAL = "Thought: ", "\nFinal Answer: "
_ACTION, _INPUT, _OBSERVATION = "\nAction:", "\nAction Input:", "\nObservation:"
_KNOWN = "Thought: I now know the final answer.\nFinal Answer: "

# What the model was trained on, to the letter.
_INSTRUCTION = """\
Answer the following questions as best you can. You have access to the following APIs:

{functions}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""
_FUNCTION = (
    "{name}: Call this tool to interact with the {human} API. "
    "What is the {human} API useful for? {description} Parameters: {parameters}"
)

Functions = Sequence[Mapping[str, object]]
"""OpenAI's `functions`: objects with name, description and parameters, a JSON schema."""


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A call that the model makes."""

    name: str
    arguments: str  # as the model wrote it: JSON if all went well


@dataclass(frozen=True, slots=True)
class ReactPrompt:
    """Turns in front of the model's reply."""

    conversation: Conversation
    is_open: bool
    """The last turn is the assistant's, unfinished: the model goes on with it."""

    def ids(self, enc: Encoding, parse_specials: bool = False) -> list[int]:
        """The prompt's ids; texts hold no control token, unless `parse_specials` parses them."""
        return encode_turns(
            enc,
            turns_of(self.conversation),
            add_generation_prompt=not self.is_open,
            continue_final_turn=self.is_open,
            parse_specials=parse_specials,
        )


def react_prompt(messages: Messages, functions: Functions = ()) -> ReactPrompt:
    """Fold OpenAI's messages, with their calls and results, into the turns of a prompt.

    A last message of the assistant, or a last result, is continued. The messages' texts lose line
    feeds in front and white space behind. Roles are system (first only), user, assistant and
    function.

    UserError: messages or functions that make no prompt, by their place.
    """
    if not any(_role(message, place) == "user" for place, message in enumerate(messages)):
        raise UserError("messages has no message of the user; expected at least one")
    system, first = None, 0
    if _role(messages[0], 0) == "system":
        system, first = _trimmed(_content(messages[0], 0, may_be_null=False)), 1
    turns = _folded(messages, first, bool(functions))
    is_open = turns[-1].role == "assistant"
    asked = [] if is_open else [turns.pop()]
    _refuse_unpaired(turns)
    turns = [Turn(turn.role, _trimmed(turn.text)) for turn in (*turns, *asked)]
    if functions:
        # In front of the last question that has an answer, else of the only one.
        place = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=1) - 1
        text = f"{_instruction(functions)}\n\nQuestion: {turns[place].text}"
        turns[place] = Turn("user", text)
    return ReactPrompt(Conversation(system, tuple(turns)), is_open)


def react_stops(stop: Iterable[str], functions: Functions = ()) -> list[str]:
    """The stop strings of a request: with functions, as officially, the client's own also without
    their leading line feeds, and what a call ends with."""
    given = list(stop)
    if not functions:
        return list(dict.fromkeys(given))
    bare = [text.lstrip("\n") for text in given]
    return list(dict.fromkeys([*given, *(text for text in bare if text), STOP]))


def parse_reply(text: str) -> tuple[str, FunctionCall | None]:
    """Content and call of what the model wrote when it had functions.

    The first call counts, and is one whatever comes before or after it; an answer is what follows
    the last `Final Answer: ` that begins a line, or else the whole text. A call without a name is
    no call; as officially, such a text then ends with `Observation:`.
    """
    action, given = text.find(_ACTION), text.find(_INPUT)
    if not 0 <= action < given:
        return _answer(text), None
    name, begin = text[action + len(_ACTION) : given].strip(), given + len(_INPUT)
    observation = text.find(_OBSERVATION)
    if not name:
        is_there = text.find(_OBSERVATION, begin) >= 0
        return _answer(text if is_there else text.rstrip() + _OBSERVATION), None
    end = len(text) if observation < 0 else observation
    return thought_of(text[:action]), FunctionCall(name, text[begin:end].strip())


def thought_of(text: str) -> str:
    """The content beside a call: the text in front of it, without the first `Thought: ` and all
    that stands before that."""
    return text.partition(_THOUGHT)[2].strip() if _THOUGHT in text else text.strip()


def _answer(text: str) -> str:
    return text.rpartition(_FINAL)[2]


def _folded(messages: Messages, first: int, has_functions: bool) -> list[Turn]:
    """User and assistant turns: calls and results become text of the assistant's."""
    turns: list[Turn] = []
    last = len(messages) - 1
    for place, message in enumerate(messages[first:], start=first):
        role, before = _role(message, place), turns[-1].role if turns else None
        text = _trimmed(_content(message, place))
        if role == "user":
            turns.append(Turn("user", text))
        elif role == "system":
            raise UserError(f"messages[{place}].role is 'system'; expected it first, if at all")
        elif role == "function":
            if before != "assistant":
                came = f"messages[{place}] is a function's result"
                raise UserError(f"{came}; expected it after a message of the assistant")
            text = f"{turns[-1].text}{_OBSERVATION} {text}"
            turns[-1] = Turn("assistant", text + ("\nThought:" if place == last else ""))
        else:
            text = _assistant(message, place, text, has_functions)
            if before == "assistant":
                turns[-1] = Turn("assistant", f"{turns[-1].text}\n{text}")
            elif before == "user":
                turns.append(Turn("assistant", _trimmed(text)))
            else:
                raise UserError(
                    f"messages[{place}] is the assistant's; expected a user's before it"
                )
    return turns


def _assistant(message: Mapping[str, object], place: int, text: str, has_functions: bool) -> str:
    call = message.get("function_call")
    if call is None:
        return f"{_KNOWN}{text}" if has_functions else text
    fields = call if isinstance(call, Mapping) else {}
    name, arguments = fields.get("name"), fields.get("arguments")
    if not isinstance(name, str) or arguments is None:
        raise UserError(
            f"messages[{place}].function_call: expected an object of name and arguments"
        )
    thought = text if text.startswith("Thought:") else f"{_THOUGHT}{text}"
    return f"{thought}{_ACTION} {name}{_INPUT} {arguments}"


def _refuse_unpaired(turns: Sequence[Turn]) -> None:
    """Raise unless every question but the last has an answer."""
    for turn, after in zip(turns[::2], [*turns[1::2], None], strict=False):
        if turn.role != "user" or after is None or after.role != "assistant":
            raise UserError("messages has two questions in a row; expected an answer between them")


def _instruction(functions: Functions) -> str:
    described, names = [], []
    for place, function in enumerate(functions):
        if not isinstance(function, Mapping) or "parameters" not in function:
            raise UserError(f"functions[{place}]: expected an object of name and parameters")
        plain = function.get("name", "")
        name = function.get("name_for_model", plain)
        names.append(str(name))
        described.append(
            _FUNCTION.format(
                name=name,
                human=function.get("name_for_human", plain),
                description=function.get("description_for_model", function.get("description", "")),
                parameters=json.dumps(function["parameters"], ensure_ascii=False),
            )
        )
    return _INSTRUCTION.format(functions="\n\n".join(described), names=", ".join(names))


def _role(message: object, place: int) -> str:
    roles = ("system", "user", "assistant", "function")
    if not isinstance(message, Mapping):
        came = type(message).__name__
        raise UserError(f"messages[{place}] is {came}; expected an object with role and content")
    role = message.get("role")
    if role not in roles:
        raise UserError(
            f"messages[{place}].role is {role!r:.80}; expected one of {', '.join(roles)}"
        )
    return str(role)


def _content(message: Mapping[str, object], place: int, may_be_null: bool = True) -> str:
    if "content" not in message and "function_call" not in message:
        raise UserError(f"messages[{place}] has no content")
    content = message.get("content")
    return "" if content is None and may_be_null else text_of(content, place)


def _trimmed(text: str) -> str:
    return text.lstrip("\n").rstrip()
