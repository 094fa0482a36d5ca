"""The observer tells each of its three listeners what concerns it, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from qwen_ds.train.observe.observer import Observer


class Listener:
    """Notes the calls of any method, under its own name."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]]) -> None:
        self.name, self.calls = name, calls

    def __getattr__(self, method: str) -> Any:
        return lambda *args: self.calls.append((self.name, method, *args))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.calls.append((self.name, "begins", name))
        yield
        self.calls.append((self.name, "ends", name))


def test_a_step_reaches_watchdog_profiler_and_progress() -> None:
    """The progress' clock starts first and stops last: it measures the whole step."""
    calls: list[tuple[Any, ...]] = []
    listeners: Any = [Listener(name, calls) for name in ("watchdog", "profiler", "progress")]
    step: Any = SimpleNamespace(number=3)
    with Observer(*listeners) as observer:
        observer.begin_step(3)
        observer.at(3, "micro-batch 1 of 2")
        with observer.part("forward"):
            pass
        observer.end_step(step)
    assert calls == [
        ("progress", "begin_step"), ("profiler", "begin_step", 3),
        ("watchdog", "at", 3, "micro-batch 1 of 2"),
        ("profiler", "begins", "forward"), ("profiler", "ends", "forward"),
        ("profiler", "end_step", 3), ("progress", "end_step", step),
        ("progress", "__exit__", None, None, None),
    ]  # fmt: skip
