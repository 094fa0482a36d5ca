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
from serve.api.sampling import sampling_params, seed_of_choice, structure_of
from serve.api.served import Served
from serve.structure import Structure

Json = dict[str, Any]
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
        most = body.max_completion_tokens or body.max_tokens
        new_tokens = served.room_for_answer(len(ids), room, most)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if logprobs is None and body.top_logprobs:
            raise ApiError(400, "top_logprobs is set and logprobs is not", "top_logprobs")
        sampling = sampling_params(body, new_tokens, logprobs)
        structure = structure_of(body)
        if asked.must_call:
            if structure is not None:
                raise ApiError(400, "response_format beside a forced call", "response_format")
            structure = _must_call(asked.must_call)
        stops = tuple(react_stops(body.stops, asked.functions))
        self.jobs = [
            Job(
                tuple(ids),
                replace(sampling, seed=seed_of_choice(sampling.seed, i)),
                stops,
                self.adapter,
                structure,
            )
            for i in range(body.n or 1)
        ]
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
                reason = self._call_reason
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
            reason = self._call_reason if is_call else event.finish_reason
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
    """The functions that a request lets the model call. ApiError 400: wrong ones, or two kinds."""
    if body.functions is not None and body.tools is not None:
        raise ApiError(400, "functions and tools are given; expected one of them", "tools")
    if body.tools is not None:
        functions, choice, name = tools_as_functions(body.tools), body.tool_choice, "tool_choice"
    else:
        functions, choice, name = list(body.functions or ()), body.function_call, "function_call"
    names = tuple(str(f.get("name_for_model", f.get("name", ""))) for f in functions)
    if choice == "none":
        return AskedFunctions([])
    if choice in (None, "auto"):
        return AskedFunctions(functions)
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
        raise ApiError(
            400, "this is a base model, which knows no turns; expected /v1/completions", "messages"
        )
    try:
        return react_prompt(with_calls_in_turn(messages), functions)
    except UserError as error:
        param = "functions" if str(error).startswith("functions") else "messages"
        raise ApiError(400, str(error), param) from None


def with_calls_in_turn(messages: list[Json]) -> list[Json]:
    """Messages with tool_calls as ones with single function_calls, each with its result behind it;
    the roles developer and tool are system and function."""
    found: list[Json] = []
    results = {
        str(message["tool_call_id"]): message
        for message in messages
        if message.get("role") == "tool" and message.get("tool_call_id") is not None
    }
    placed: set[str] = set()
    for place, message in enumerate(messages):
        role, calls = message.get("role"), message.get("tool_calls")
        if role == "assistant" and calls:
            for i, call in enumerate(_calls(calls, place)):
                content = message.get("content") if i == 0 else None
                found.append({"role": role, "content": content, "function_call": call["function"]})
                result = results.get(str(call.get("id")))
                if result is not None and str(call.get("id")) not in placed:
                    placed.add(str(call["id"]))
                    found.append({"role": "function", "content": result.get("content")})
        elif role == "tool":
            if str(message.get("tool_call_id")) not in placed:
                found.append({**message, "role": "function"})
        else:
            found.append({**message, "role": "system"} if role == "developer" else message)
    return found


def _calls(calls: object, place: int) -> list[Mapping[str, Any]]:
    good = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    )
    if not good:
        came = f"messages[{place}].tool_calls"
        raise ApiError(400, f"{came}: expected objects with function", "messages")
    return list(calls) if isinstance(calls, list) else []


def _must_call(names: tuple[str, ...]) -> Structure:
    """A reply that calls one of these functions."""
    one_of = "|".join(re.escape(name) for name in names)
    return Structure("regex", rf"[^\n]*\nAction: ({one_of})\nAction Input: ?[^\n](.|\n)*")
