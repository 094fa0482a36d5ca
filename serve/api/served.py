"""The models behind the API: names that clients ask for, and what the front knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_ds.model.folder import ModelFolder
from qwen_ds.model.tokenizer import Encoding
from serve.api.errors import ApiError, shortened


def knows_turns(folder: ModelFolder, has_adapters: bool) -> bool:
    """Whether chats are answered; an adapter is trained in ChatML, on a base model, too."""
    return has_adapters or folder.family.chat_format(dict(folder.generation)) == "chatml"


@dataclass(frozen=True, slots=True)
class Served:
    """A base, by one name or several, and its adapters by theirs."""

    names: tuple[str, ...]
    adapters: tuple[str, ...]
    encoding: Encoding
    context: int  # tokens that prompt and answer may have together
    chats: bool  # false: a base model, which knows no turns

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a request for `model` means; None for the base, and for no name.

        ApiError 404: no such model.
        """
        if model is None or model in self.names:
            return None
        if model in self.adapters:
            return model
        known = ", ".join((*self.names, *self.adapters))
        raise ApiError(
            404,
            f"there is no model {shortened(model)}; expected one of: {known}",
            "model",
            "model_not_found",
        )

    def name_of(self, model: str | None) -> str:
        return self.names[0] if model is None else model

    def text_of(self, ids: Sequence[int], param: str) -> str:
        """The text of ids that a client has sent. ApiError 400: one that the vocabulary lacks."""
        size = self.encoding.n_vocab
        if wrong := [token for token in ids if token >= size]:
            raise ApiError(400, f"a token id is {wrong[0]}; expected 0 to {size - 1}", param)
        return self.encoding.decode(ids)

    def room_for_answer(self, prompt: int, room: int, asked: int | None, field: str) -> int:
        """Tokens that an answer to a prompt of so many may have.

        Args:
            room: tokens of keys and values of an engine, which a request must fit into.
            asked: by the request; None: as many as there is room for.
            field: of the request, which holds the prompt.

        ApiError 400: the prompt alone, or with what is asked, is beyond the context.
        """
        most = self.context - prompt
        if most < 1 or (asked or 0) > most:
            wanted = "" if asked is None else f", and {asked} are asked for"
            raise ApiError(
                400,
                f"this model's context is {self.context} tokens; the prompt has {prompt}{wanted}",
                "max_tokens" if most >= 1 else field,
                "context_length_exceeded",
            )
        return max(1, min(most, room - prompt)) if asked is None else asked
