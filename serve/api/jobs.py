"""Messages between the front and an engine's process, over a pipe of our own."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ds.decode.exceptions import DecodingError, InvalidGrammar, InvalidSampling
from qwen_ds.decode.request import PromptFigures
from qwen_ds.decode.sampler import TokenLogprobs
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.decode.stop import FinishReason
from serve.structure import Structure


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt to answer."""

    ids: tuple[int, ...]
    sampling: SamplingParams
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()  # beside the model's own
    skip_special_tokens: bool = False
    adapter: str | None = None
    structure: Structure | None = None
    num_beams: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that it may take, prompt and answer."""
        return len(self.ids) + self.sampling.max_new_tokens


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job has no answer, or no whole one."""

    kind: str  # name of a class of qwen_ds.decode.exceptions, or ENGINE_GONE
    message: str
    param: str | None = None  # the parameter that is to blame


def job_error(error: DecodingError) -> JobError:
    """An error of the engine as a message."""
    param = error.name if isinstance(error, InvalidSampling | InvalidGrammar) else None
    return JobError(type(error).__name__, str(error), param)


ENGINE_GONE = "EngineGone"


@dataclass(frozen=True, slots=True)
class Event:
    """One job's share of a step."""

    key: int
    token: int | None
    text: str = ""
    finish_reason: FinishReason | None = None
    error: JobError | None = None
    logprobs: TokenLogprobs | None = None
    prompt: PromptFigures | None = None  # with the first token
    begun: float | None = None  # with it, too: when the job left the queue (time.monotonic)

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class Ready:
    """An engine that has loaded its model."""

    room: int  # tokens of keys and values
    slots: int
    gigabytes: float


@dataclass(frozen=True, slots=True)
class Figures:
    """The state of an engine after a step."""

    running: int = 0
    waiting: int = 0
    pages_used: float = 0.0  # share
    put_back: int = 0  # since the engine began, as the next two
    cached_tokens: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepEvents:
    """Events of a step, and how the engine stands after it."""

    events: tuple[Event, ...]
    figures: Figures


@dataclass(frozen=True, slots=True)
class Refused:
    """A model that cannot be loaded: the process's last words."""

    message: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Submit:
    """A job for the engine."""

    key: int
    job: Job


@dataclass(frozen=True, slots=True)
class Cancel:
    """A job that nobody waits for any more."""

    key: int
