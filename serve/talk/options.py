"""Options of serve.chat: the command line is made from this class."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ds.recipe.ranges import PositiveFloat, PositiveInt
from serve.endpoint.options import EndpointOptions, check_source
from serve.options import LoadOptions, SamplingOptions

_ONLY_HERE = ("adapter", "allow_pickle", "device", "dtype", "memory_gb")


@dataclass(frozen=True, kw_only=True)
class ChatOptions(LoadOptions, SamplingOptions, EndpointOptions):
    """Options of serve.chat."""

    model: str | None = None
    """Folder or hub id of a Qwen checkpoint. Not needed with endpoint."""
    system: str | None = None
    """System text; unset means the original's "You are a helpful assistant."."""
    max_new_tokens: PositiveInt = 512
    """Tokens of an answer at most, and at most what the context leaves."""
    memory_gb: PositiveFloat | None = None
    """GB (10^9 bytes) for keys and values of the conversation; unset: most of what is free."""

    def __post_init__(self) -> None:
        self.check_answers()
        check_source(self, self.model, _ONLY_HERE)
