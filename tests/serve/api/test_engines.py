"""Engines as the front sees them: what they still have to do, and one that hangs."""

from __future__ import annotations

import time
from typing import Any

import pytest

from qwen_ds.decode.request import PromptFigures
from qwen_ds.decode.sampling import SamplingParams
from serve.api.engines import EngineProcess
from serve.api.jobs import Event, Figures, Job, Ready, StepEvents


class Process:
    """A process that is only killed."""

    was_killed = False

    def kill(self) -> None:
        self.was_killed = True


@pytest.fixture
def engine() -> EngineProcess:
    found = EngineProcess(None, 0)  # type: ignore[arg-type]
    found._process = Process()  # type: ignore[assignment]
    found._take(Ready(1000, 4, 1.0))
    return found


def job(prompt: int, answer: int, beams: int = 1) -> Job:
    return Job((1,) * prompt, SamplingParams(max_new_tokens=answer), num_beams=beams)


def step(engine: EngineProcess, *events: Event) -> None:
    engine._take(StepEvents(events, Figures()))


def test_outstanding_tokens_fall_as_tokens_come(engine: EngineProcess) -> None:
    """An answer that may be long and is nearly done must not outweigh many short ones."""
    seen: list[Event] = []
    for new in (8000, 10):
        engine.submit(job(5, new), seen.append)
    assert engine.outstanding_tokens == 5 + 8000 + 5 + 10
    step(engine, Event(1, 7, prompt=PromptFigures(0)))
    assert engine.outstanding_tokens == 7999 + 5 + 10
    step(engine, *[Event(1, 7) for _ in range(20)])
    assert engine.outstanding_tokens == 7979 + 5 + 10
    step(engine, Event(1, 7, finish_reason="stop"))
    assert engine.outstanding_tokens == 5 + 10 and len(seen) == 22
    engine.cancel(2)
    assert engine.outstanding_tokens == 0


def test_an_engine_that_has_work_and_says_nothing_is_killed(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process: Any = engine._process
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    now += 1000
    engine.end_if_silent(300)
    assert not process.was_killed  # nothing to say
    engine.submit(job(5, 5), lambda event: None)
    engine.end_if_silent(300)
    assert not process.was_killed  # it has only just got it
    now += 299
    step(engine, Event(1, 7, prompt=PromptFigures(0)))
    now += 299
    engine.end_if_silent(300)
    assert not process.was_killed
    now += 2
    engine.end_if_silent(300)
    assert process.was_killed


def test_beams_are_not_taken_for_a_hanging_engine(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process: Any = engine._process
    engine.submit(job(5, 5, beams=4), lambda event: None)
    now = time.monotonic() + 1000
    monkeypatch.setattr(time, "monotonic", lambda: now)
    engine.end_if_silent(300)
    assert not process.was_killed
