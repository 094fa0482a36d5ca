"""/v1/chat/completions: from messages to jobs, and from an engine's events to OpenAI's answers."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qwen_ds.decode.sampler import TokenLogprobs
from qwen_ds.errors import UserError
from qwen_ds.model.react import FunctionCall, ReactPrompt, parse_reply, react_prompt, react_stops
from serve.answering import as_json
from serve.api.bodies import ChatBody
from serve.api.errors import ApiError
from serve.api.jobs import Event, Job
from serve.api.replies import ReplyPart, ReplyParts
from serve.api.sampling import (
    bound_logprobs,
    form_name,
    sampling_params,
    seed_of_choice,
    stop_ids_of,
    structure_of,
)
from serve.api.served import Served
from serve.structure import Structure

Json = dict[str, Any]
_LONGEST_THOUGHT = 1000  # characters before a call that must come
_NO_PARAMETERS: Json = {"type": "object", "properties": {}}


@dataclass(slots=True)
class ChatChoice:
    """One answer as it comes."""

    index: int
    parts: ReplyParts | None  # where the request has functions
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    call_id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class ChatRequest:
    """One request, from its body to its answers. ApiError 400: a request that makes no prompt."""

    def __init__(self, body: ChatBody, served: Served, room: int) -> None:
        self.body = body
        self.id = f"chatcmpl-{secrets.token_hex(16)}"
        self.created = int(time.time())
        self.model = served.name_of(body.model)
        self._served = served
        self.adapter = served.adapter_of(body.model)
        asked = functions_of(body)
        self._has_tools = body.tools is not None
        self._functions = asked.functions
        prompt = prompt_of(served, body.messages, asked.functions)
        self._continues = prompt.is_open
        ids = prompt.ids(served.encoding)
        refuse_other_ends(body)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        new_tokens = served.room_for_answer(len(ids), room, most, "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if logprobs is None and body.top_logprobs:
            raise ApiError(400, "top_logprobs is set and logprobs is not", "top_logprobs")
        sampling = sampling_params(body, served, new_tokens, logprobs)
        structure = structure_of(body)
        if asked.must_call:
            if structure is not None:
                came = f"{form_name(body)} is set and so is a call that must be made"
                raise ApiError(400, f"{came}; expected one of them", form_name(body))
            structure = _must_call(asked, "functions" if body.tools is None else "tools")
        stops = tuple(react_stops(body.stops, asked.functions))
        stop_ids = stop_ids_of(body, served)
        self.jobs = [
            Job(
                tuple(ids),
                replace(sampling, seed=seed_of_choice(sampling.seed, i)),
                stops,
                stop_ids,
                bool(body.skip_special_tokens),
                self.adapter,
                structure,
            )
            for i in range(body.n or 1)
        ]
        bound_logprobs(self.jobs)
        self.choices = [
            ChatChoice(i, ReplyParts(self._continues) if asked.functions else None)
            for i in range(len(self.jobs))
        ]

    def take(self, index: int, event: Event) -> None:
        """Take an event of an answer that is sent as a whole."""
        choice = self.choices[index]
        choice.text += event.text
        if event.logprobs is not None:
            choice.logprobs.append(event.logprobs)
        choice.finish_reason = event.finish_reason

    def answer(self, usage: Json) -> Json:
        """The whole answer."""
        choices = []
        for choice in self.choices:
            content: str | None = choice.text
            call = None
            if self._functions:
                content, call = parse_reply(choice.text)
            message: Json = {"role": "assistant", "content": content}
            reason = choice.finish_reason
            if call is not None:
                message |= self._call(choice, call)
                # One that was cut says so: its arguments are not whole.
                reason = self._call_reason if reason == "stop" else reason
                if self._has_tools and not content:
                    message["content"] = None
            one = {"index": choice.index, "message": message, "finish_reason": reason}
            one["logprobs"] = self._logprobs(choice.logprobs) if self.body.logprobs else None
            choices.append(one)
        return self._envelope("chat.completion", choices) | {"usage": usage}

    def first_chunk(self, index: int) -> Json:
        """The chunk that opens an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(self, index: int, event: Event) -> list[Json]:
        """The chunks that an event brings."""
        choice, body = self.choices[index], self.body
        told = [] if event.logprobs is None else [event.logprobs]
        logprobs = self._logprobs(told) if body.logprobs else None
        is_end = event.finish_reason is not None
        if choice.parts is None:
            found = [{"content": event.text}] if event.text or told else []
        else:
            parts = choice.parts.push(event.text)
            parts += choice.parts.finish() if is_end else []
            found = [self._delta(choice, part) for part in parts]
            found = found or ([{"content": ""}] if told else [])
        chunks = [
            self._chunk(index, delta, logprobs if i == 0 else None) for i, delta in enumerate(found)
        ]
        if is_end:
            is_call = choice.parts is not None and choice.parts.is_call
            is_whole = is_call and event.finish_reason == "stop"
            reason = self._call_reason if is_whole else event.finish_reason
            chunks.append(self._chunk(index, {}, None, reason))
        return chunks

    def usage_chunk(self, usage: Json) -> Json:
        """The last chunk, where usage is asked for."""
        return self._envelope("chat.completion.chunk", []) | {"usage": usage}

    @property
    def _call_reason(self) -> str:
        return "tool_calls" if self._has_tools else "function_call"

    def _call(self, choice: ChatChoice, call: FunctionCall) -> Json:
        function = {"name": call.name, "arguments": call.arguments}
        if not self._has_tools:
            return {"function_call": function}
        one = {"id": choice.call_id, "type": "function", "function": function}
        return {"tool_calls": [one]}

    def _delta(self, choice: ChatChoice, part: ReplyPart) -> Json:
        if part.kind == "content":
            return {"content": part.text}
        if part.kind == "name":
            function = {"name": part.text, "arguments": ""}
        else:
            function = {"arguments": part.text}
        if not self._has_tools:
            return {"function_call": function}
        one: Json = {"index": 0, "function": function}
        if part.kind == "name":
            one |= {"id": choice.call_id, "type": "function"}
        return {"tool_calls": [one]}

    def _chunk(
        self, index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None
    ) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._envelope("chat.completion.chunk", [choice])

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _logprobs(self, told: list[TokenLogprobs]) -> Json:
        return {"content": [as_json(one, self._served.encoding.token_bytes) for one in told]}


@dataclass(frozen=True, slots=True)
class AskedFunctions:
    """The functions of a request, and those of which one must be called."""

    functions: list[Json]
    must_call: tuple[str, ...] = ()


def functions_of(body: ChatBody) -> AskedFunctions:
    """The functions that a request lets the model call. ApiError 400: wrong ones, two kinds, or a
    choice among functions that are not there."""
    if body.functions is not None and body.tools is not None:
        raise ApiError(400, "functions and tools are given; expected one of them", "tools")
    choice: str | Json | None
    other: str | Json | None
    if body.tools is not None:
        functions, choice, name = tools_as_functions(body.tools), body.tool_choice, "tool_choice"
        other, other_name, list_name = body.function_call, "function_call", "functions"
    else:
        functions, choice, name = list(body.functions or ()), body.function_call, "function_call"
        other, other_name, list_name = body.tool_choice, "tool_choice", "tools"
    # Without functions nothing is called anyway.
    if other not in ((None, "auto") if functions else (None, "auto", "none")):
        raise ApiError(400, f"{other_name} is set and {list_name} is not", other_name)
    names = tuple(map(_name_of, functions))
    if choice == "none":
        return AskedFunctions([])
    if choice in (None, "auto"):
        return AskedFunctions(functions)
    if not all(names):
        came = f"{name} asks for a call, and a function has no name"
        raise ApiError(400, f"{came}; expected each with one", name)
    if choice == "required" and names:
        return AskedFunctions(functions, names)
    wanted = choice if isinstance(choice, dict) else {}
    wanted = wanted.get("function", {}) if name == "tool_choice" else wanted
    chosen = wanted.get("name") if isinstance(wanted, dict) else None
    if chosen not in names:
        raise ApiError(400, f"{name} names no function that is given", name)
    return AskedFunctions(functions, (str(chosen),))


def tools_as_functions(tools: list[Json]) -> list[Json]:
    """OpenAI's tools as functions. ApiError 400: a tool of another kind."""
    functions = []
    for place, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise ApiError(400, f"tools[{place}] is not of type function", "tools")
        functions.append({"parameters": _NO_PARAMETERS} | function)
    return functions


def prompt_of(served: Served, messages: list[Json], functions: list[Json]) -> ReactPrompt:
    """The prompt of a chat. ApiError 400: messages that make none."""
    if not served.chats:
        came = "generation_config.json says chat_format raw: a base model, which knows no turns"
        raise ApiError(400, f"{came}; expected /v1/completions", "messages")
    placed = with_calls_in_turn(messages)
    try:
        return react_prompt([message for _, message in placed], functions)
    except UserError as error:
        # Calls and their results have moved; the client's own numbers are told.
        told = re.sub(
            r"^messages\[(\d+)\]", lambda found: f"messages[{placed[int(found[1])][0]}]", str(error)
        )
        param = "functions" if told.startswith("functions") else "messages"
        raise ApiError(400, told, param) from None


def with_calls_in_turn(messages: list[Json]) -> list[tuple[int, Json]]:
    """Messages with tool_calls as ones with single function_calls, each with its result behind it;
    the roles developer and tool are system and function. Each with its place among `messages`."""
    found: list[tuple[int, Json]] = []
    placed: set[int] = set()
    for place, message in enumerate(messages):
        role, calls = message.get("role"), message.get("tool_calls")
        if role == "assistant" and calls:
            results = _results_behind(messages, place)  # ids may come again later
            for i, call in enumerate(_calls(calls, place)):
                content = message.get("content") if i == 0 else None
                one = {"role": role, "content": content, "function_call": call["function"]}
                found.append((place, one))
                if mine := results.get(str(call.get("id"))):
                    result = mine.pop(0)
                    placed.add(result)
                    found.append((result, {**messages[result], "role": "function"}))
        elif place not in placed:
            own_role = {"developer": "system", "tool": "function"}.get(str(role), role)
            found.append((place, {**message, "role": own_role}))
    return found


def _results_behind(messages: list[Json], place: int) -> dict[str, list[int]]:
    """Places of the results between a message of the assistant and the next one, by their ids."""
    found: dict[str, list[int]] = {}
    for i in range(place + 1, len(messages)):
        role = messages[i].get("role")
        if role == "assistant":
            break
        if role == "tool":
            found.setdefault(str(messages[i].get("tool_call_id")), []).append(i)
    return found


def _calls(calls: object, place: int) -> list[Mapping[str, Any]]:
    good = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    )
    if not good:
        came = f"messages[{place}].tool_calls"
        raise ApiError(400, f"{came}: expected objects with function", "messages")
    return list(calls) if isinstance(calls, list) else []


def refuse_other_ends(body: ChatBody) -> None:
    """Raise ApiError where the body asks for another end of the prompt than its last message
    gives it."""
    continues = body.messages[-1].get("role") == "assistant"
    for name, value, is_so in (
        ("continue_final_message", body.continue_final_message, continues),
        ("add_generation_prompt", body.add_generation_prompt, not continues),
    ):
        if value not in (None, is_so):
            came = f"{name} is {str(value).lower()}"
            expected = "a last message of the assistant is continued, no other one is"
            raise ApiError(400, f"{came}; {expected}", name)


def _must_call(asked: AskedFunctions, name: str) -> Structure:
    """A reply that calls one of the functions that must be called, with arguments by its schema.

    Qwen's own form of parameters, a list, is no schema: then the arguments are any text.
    """
    schemas = {_name_of(one): one.get("parameters") for one in asked.functions}
    chosen = {
        name: schema if isinstance(schema := schemas[name], dict) else None
        for name in asked.must_call
    }
    return Structure("call", {"functions": chosen, "thought": _LONGEST_THOUGHT}, name)


def _name_of(function: Json) -> str:
    return str(function.get("name_for_model", function.get("name", "")))
