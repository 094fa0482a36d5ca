"""The process of one engine: jobs come through a pipe, and each step's events go back."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch

from qwen_ds.decode.engine import DecodingEngine
from qwen_ds.decode.exceptions import DecodingError, InvalidGrammar
from qwen_ds.decode.grammar import GrammarCompiler
from qwen_ds.decode.request import Request, Update
from qwen_ds.decode.stop import StopRule
from qwen_ds.errors import EXIT_FAILURE, EXIT_USER, UserError
from qwen_ds.machine import available_memory
from qwen_ds.model.folder import ModelFolder, find_model
from qwen_ds.model.tokenizer import Encoding
from qwen_ds.runlog import in_one_line
from serve.api.beams import BeamJobs
from serve.api.jobs import (
    Cancel,
    Event,
    Figures,
    Job,
    JobError,
    Ready,
    Refused,
    StepEvents,
    Submit,
    job_error,
)
from serve.engine.engine import MEMORY_SHARE, ServingEngine
from serve.engine.loading import load_engine, silence_libraries


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Everything that an engine's process needs to begin."""

    model: str
    adapters: dict[str, str]  # folders by name
    device: str
    dtype: str
    allow_pickle: bool
    slots: int
    prefill_tokens: int
    memory_gb: float | None
    threads: int | None  # of a CPU, at most; None: torch's default


def memory_each(folder: ModelFolder, number: int) -> float:
    """GB for keys and values of each of several engines that share a machine's memory."""
    weights = sum(spec.num_bytes for spec in folder.stored.tensors.values())
    return max(0.0, MEMORY_SHARE * (available_memory() / number - weights)) / 1e9


def work(pipe: Connection, settings: EngineSettings, number: int) -> None:
    """Load a model and answer jobs until the pipe closes. The target of a process."""
    # The front decides when an engine ends: a terminal's Ctrl-C reaches both, and so may SIGTERM.
    for number_of_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_of_signal, signal.SIG_IGN)
    silence_libraries()
    if settings.threads is not None:
        torch.set_num_threads(min(settings.threads, torch.get_num_threads()))
    try:
        loop = _load(pipe, settings, number)
    except Exception as error:
        pipe.send(_refused(error))
        return
    try:
        loop.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the front is gone
        return


def _load(pipe: Connection, settings: EngineSettings, number: int) -> EngineLoop:
    s = settings
    folder = find_model(s.model)
    encoding = folder.encoding
    # Beside the weights: it takes a second or two, and would hold up all answers later.
    compiler = ThreadPoolExecutor(1).submit(
        GrammarCompiler, encoding.token_bytes, encoding.n_vocab, folder.family.stop_ids(encoding)
    )
    engine = load_engine(
        folder, None, s.device, s.dtype, adapters=s.adapters, allow_pickle=s.allow_pickle,
        gpu=number,
    )  # fmt: skip
    decoding = engine.start(s.slots, s.prefill_tokens, s.memory_gb)
    store = decoding.store
    room = store.num_pages * store.page_size
    pipe.send(Ready(room, s.slots, room * store.shape.bytes_per_token / 1e9))
    return EngineLoop(pipe, engine, decoding, compiler, encoding)


def _refused(error: Exception) -> Refused:
    if isinstance(error, UserError):
        return Refused(str(error), EXIT_USER)
    message = in_one_line(error)
    return Refused(message or "".join(traceback.format_exception(error)), EXIT_FAILURE)


class EngineLoop:
    """Steps of one engine, and the messages between them."""

    def __init__(
        self,
        pipe: Connection,
        engine: ServingEngine,
        decoding: DecodingEngine,
        compiler: Future[GrammarCompiler],
        encoding: Encoding,
    ) -> None:
        self._pipe, self._engine, self._decoding = pipe, engine, decoding
        self._compiler = compiler
        self._beams = BeamJobs(engine, encoding, self._tell)
        self._sending = threading.Lock()
        self._key_of: dict[int, int] = {}  # by the engine's own number
        self._number_of: dict[int, int] = {}
        self._begun: dict[int, float] = {}  # when jobs left the queue, by the engine's number

    def run(self) -> None:
        """StepEvents for as long as the pipe is open."""
        while True:
            events = list(self._take())
            if self._decoding.is_busy:
                began = time.monotonic()
                with torch.inference_mode():
                    updates = self._decoding.step()
                for one in self._decoding.scheduler.running:
                    self._begun.setdefault(one.id, began)
                events += self._events(updates, began)
            self._tell(events)

    def _tell(self, events: Sequence[Event]) -> None:
        """Send events, and how the engine stands; from any thread."""
        with self._sending:
            self._pipe.send(StepEvents(tuple(events), self._figures()))

    def _take(self) -> Iterator[Event]:
        """Take the messages that are there, and wait for one where there is nothing to do; yield
        the ends of jobs that cannot be begun."""
        while not self._decoding.is_busy or self._pipe.poll():
            message = self._pipe.recv()
            if isinstance(message, Submit):
                if (error := self._submit(message.key, message.job)) is not None:
                    yield Event(message.key, None, error=error)
                    return
            else:
                assert isinstance(message, Cancel)
                self._cancel(message.key)
                if not self._decoding.is_busy:
                    return

    def _submit(self, key: int, job: Job) -> JobError | None:
        if job.num_beams > 1:
            return self._beams.submit(key, job)
        try:
            grammar = (
                None if job.structure is None else job.structure.compiled(self._compiler.result())
            )
            number = self._decoding.submit(
                Request(
                    job.ids,
                    job.sampling,
                    self._stop(job),
                    job.adapter,
                    stop_strings=job.stops,
                    grammar=grammar,
                    skip_special_tokens=job.skip_special_tokens,
                )
            )
        except InvalidGrammar as error:  # under the name that the client gave it
            name = "" if job.structure is None else job.structure.name
            return job_error(InvalidGrammar(name or error.name, error.reason))
        except DecodingError as error:
            return job_error(error)
        self._key_of[number], self._number_of[key] = key, number
        return None

    def _stop(self, job: Job) -> StopRule:
        """The model's own stops and the job's, which count with ignore_eos, too."""
        own = self._engine.stop
        sequences = tuple((token,) for token in job.stop_ids)
        return replace(own, sequences=own.sequences + sequences) if sequences else own

    def _cancel(self, key: int) -> None:
        if self._beams.cancel(key):
            return
        number = self._number_of.pop(key, None)
        if number is not None:  # else it has ended
            del self._key_of[number]
            self._begun.pop(number, None)
            self._decoding.cancel(number)

    def _events(self, updates: list[Update], began: float) -> Iterator[Event]:
        for update in updates:
            key, begun = self._key_of[update.id], None
            if update.prompt is not None:
                begun = self._begun.get(update.id, began)  # one that ends in its first step
            if update.finish_reason is not None or update.error is not None:
                del self._key_of[update.id], self._number_of[key]
                self._begun.pop(update.id, None)
            yield Event(
                key,
                update.token,
                update.text,
                update.finish_reason,
                None if update.error is None else job_error(update.error),
                update.logprobs,
                update.prompt,
                begun,
            )

    def _figures(self) -> Figures:
        scheduler, store = self._decoding.scheduler, self._decoding.store
        figures = self._decoding.figures
        return Figures(
            len(scheduler.running) + self._beams.number,
            len(scheduler.waiting),
            1 - store.available_pages / store.num_pages,
            figures.put_back,
            figures.cached_tokens,
            figures.prefilled_tokens + figures.cached_tokens,
        )
