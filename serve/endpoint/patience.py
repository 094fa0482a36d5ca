"""How long a server in trouble is waited for, and when a failing request is given up alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from qwen_ds.errors import Failed
from serve.endpoint.wire import EndpointRefused, Trouble

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
# A request that has failed so often while others were answered is to blame itself. With the waits
# in between that takes a minute.
MAX_TRIES = 8


class Patience:
    """The state of a server as all requests to it find it."""

    def __init__(self, seconds: float, tell: Callable[[str], None]) -> None:
        self.seconds, self._tell = seconds, tell
        self._in_trouble = False
        self.answers, self.last_answer = 0, time.monotonic()

    def answered(self) -> None:
        self.answers, self.last_answer = self.answers + 1, time.monotonic()
        self._in_trouble = False

    def tell(self, trouble: Trouble) -> None:
        """Say what is wrong, once until the next answer."""
        if not self._in_trouble:
            self._in_trouble = True
            self._tell(f"{trouble}; trying again for up to {_span(self.seconds)}")


class Tries:
    """The failed tries of one request."""

    def __init__(self, patience: Patience) -> None:
        self._patience, self._count = patience, 0
        self._since, self._answers = 0.0, 0

    def wait_after(self, trouble: Trouble) -> float:
        """Seconds to wait before the next try.

        Raises:
            EndpointRefused: the server answers others.
            Failed: it has answered nobody for too long.
        """
        patience, now = self._patience, time.monotonic()
        if not self._count:
            self._since, self._answers = now, patience.answers
        self._count += 1
        answers_others = patience.answers > self._answers
        if trouble.may_be_the_row and answers_others and self._count >= MAX_TRIES:
            raise EndpointRefused(f"{trouble}, {self._count} times")
        left = patience.seconds - (now - max(self._since, patience.last_answer))
        if left <= 0:
            raise Failed(
                f"{trouble}, and nothing else for {_span(patience.seconds)}; the same command goes "
                "on from here"
            )
        patience.tell(trouble)
        if trouble.retry_after is not None:
            return min(trouble.retry_after, left)
        wait = min(FIRST_WAIT * 2 ** min(self._count - 1, 10), LONGEST_WAIT)
        return min(wait * random.uniform(0.5, 1.0), left)  # or all would come at once


def _span(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
