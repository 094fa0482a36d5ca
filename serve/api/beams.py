"""Jobs with beams, which only the original project's route has: by transformers' `generate`, one at
a time, in a thread of their own beside the engine's steps."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from qwen_ds.decode.exceptions import DecodingError, InvalidSampling
from qwen_ds.decode.stop import FinishReason
from qwen_ds.model.tokenizer import Encoding
from qwen_ds.terminal import show
from serve.answering import Answer, Question
from serve.api.jobs import Event, Job, JobError, job_error
from serve.engine.beams import BeamAnswerer
from serve.engine.engine import ServingEngine


class BeamJobs:
    """Beam search with the model of an engine."""

    def __init__(
        self, engine: ServingEngine, encoding: Encoding, send: Callable[[Sequence[Event]], None]
    ) -> None:
        """
        Args:
            send: is called in the thread at each job's end: with its answer, which is one event, or
                with none if nobody wants it any more.
        """
        self._engine, self._encoding, self._send = engine, encoding, send
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="beams")
        self._jobs: dict[int, tuple[Future[None], threading.Event]] = {}
        self._lock = threading.Lock()  # of the jobs

    @property
    def number(self) -> int:
        """Jobs that run or wait."""
        return len(self._jobs)

    def submit(self, key: int, job: Job) -> JobError | None:
        """Begin a job; or why it cannot be."""
        if self._engine.adapters is not None:
            return job_error(InvalidSampling("num_beams", job.num_beams, "1 beside adapters"))
        # Their keys and values are not in the engine's pages.
        most = self._engine.context // job.tokens
        if job.num_beams > most:
            expected = f"at most {most} for {job.tokens} tokens of prompt and answer"
            return job_error(InvalidSampling("num_beams", job.num_beams, expected))
        is_cancelled = threading.Event()
        with self._lock:
            self._jobs[key] = self._thread.submit(self._run, key, job, is_cancelled), is_cancelled
        return None

    def cancel(self, key: int) -> bool:
        """End a job at its next token; false if there is none."""
        with self._lock:
            if (found := self._jobs.get(key)) is None:
                return False
            done, is_cancelled = found
            is_cancelled.set()
            if done.cancel():  # it had not begun
                del self._jobs[key]
            return True

    def _run(self, key: int, job: Job, is_cancelled: threading.Event) -> None:
        try:
            found = self._answer(job, is_cancelled)
        except Exception as error:  # of generate: it ends this job alone
            show("".join(traceback.format_exception(error)), err=True)
            found = DecodingError("beam search has failed; see the server's log")
        with self._lock:
            del self._jobs[key]
        self._send([] if is_cancelled.is_set() else [_event(key, found)])

    def _answer(self, job: Job, is_cancelled: threading.Event) -> Answer | DecodingError:
        engine = self._engine
        beams = BeamAnswerer(
            engine.model,
            self._encoding,
            engine.stop,
            job.num_beams,
            1,
            engine.context,
            is_cancelled.is_set,
        )
        ((_, found),) = beams.answer([Question("", job.sampling, job.ids)])
        return found


def _event(key: int, found: Answer | DecodingError) -> Event:
    if isinstance(found, DecodingError):
        return Event(key, None, error=job_error(found))
    reason: FinishReason = "stop" if found.finish_reason == "stop" else "length"
    return Event(key, None, found.text, reason)
