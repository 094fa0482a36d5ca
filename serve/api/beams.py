"""Jobs with beams, which only the original project's route has: by transformers' `generate`, while
all other work of the engine waits."""

from __future__ import annotations

from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.decode.stop import FinishReason
from qwen_ds.model.tokenizer import Encoding
from serve.answering import Question
from serve.api.jobs import Event, Job, JobError
from serve.engine.beams import BeamAnswerer
from serve.engine.engine import ServingEngine


class BeamJobs:
    """Beam search with the model of an engine."""

    def __init__(self, engine: ServingEngine, encoding: Encoding) -> None:
        self._engine, self._encoding = engine, encoding

    def answer(self, key: int, job: Job) -> Event:
        """The whole answer in one event."""
        if self._engine.adapters is not None:
            return Event(key, None, error=JobError("InvalidSampling", "num_beams with adapters"))
        model, stop = self._engine.model, self._engine.stop
        beams = BeamAnswerer(model, self._encoding, stop, job.num_beams, 1)
        ((_, found),) = beams.answer([Question("", job.sampling, job.ids)])
        if isinstance(found, DecodingError):
            return Event(key, None, error=JobError(type(found).__name__, str(found)))
        reason: FinishReason = "stop" if found.finish_reason == "stop" else "length"
        return Event(key, None, found.text, reason)
