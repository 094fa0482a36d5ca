"""/nlg/text_generate, the route of the original project: one text in, one JSON string out."""

from __future__ import annotations

import secrets
from typing import Any

from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.model.chatml import Conversation, Turn, encode_prompt
from serve.api.bodies import OriginalBody, SampledBody
from serve.api.errors import ApiError
from serve.api.jobs import Event, Job
from serve.api.served import Served


class OriginalRoute:
    """One request. ApiError 400: it asks for what is not supported."""

    def __init__(self, body: OriginalBody, served: Served, room: int) -> None:
        if body.penalty_alpha != 1.0:
            came = f"penalty_alpha is {body.penalty_alpha}"
            raise ApiError(
                400, f"{came}; expected 1.0: there is no contrastive search", "penalty_alpha"
            )
        self.model = served.names[0]
        self.body = SampledBody()
        self._text = ""
        question = f"{body.instruction}\t{body.text}".strip()
        ids = encode_prompt(served.encoding, Conversation(None, (Turn("user", question),)))
        new_tokens = served.room_for_answer(len(ids), room, body.max_new_tokens, "text")
        sampling = SamplingParams(
            body.do_sample, body.temperature, body.top_p, body.top_k, new_tokens,
            secrets.randbits(63),
        )  # fmt: skip
        self.jobs = [Job(tuple(ids), sampling, num_beams=body.num_beams)]

    def take(self, index: int, event: Event) -> None:
        self._text += event.text

    def answer(self, usage: dict[str, Any]) -> Any:
        return self._text

    def first_chunk(self, index: int) -> None:
        return None

    def chunks(self, index: int, event: Event) -> list[Any]:
        return []

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return usage
