"""Regular expressions out of an adapter's configuration: what `re` would say, in bounded time.

Anyone may have written them, and `re` has no time limit: `(\\w|\\w\\w)*!` takes it longer than the
age of the universe on one module's name. The `regex` package (a dependency of tiktoken) stops by
itself after a given time, in any thread. Both are asked to compile a pattern, and what the two read
differently is refused. So are large counts, since `regex` unrolls them when it compiles.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import regex

from qwen_ds.errors import UserError

MAX_LENGTH = 4000  # of one pattern; LLaMA-Factory's longest, with every excluded part, has 300
MAX_COUNT = 1000  # of all {m,n} of a pattern, multiplied
# Of all patterns of a configuration, compiled and matched. One for each module of Qwen-72B: 0.3.
MAX_SECONDS = 2.0

_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
# A brace that is no count begins a fuzzy match in `regex`, and [[ or [: a set of its own.
_DIFFERS = re.compile(r"\{(?!\d*,?\d*\})|\[\[|\[:")


@dataclass(slots=True)
class Patterns:
    """The compiled patterns of one adapter's configuration, and the time that they may still take.

    UserError: a pattern that is broken, too long, counts too far, or takes too long.
    """

    folder: Path
    left: float = MAX_SECONDS
    _compiled: dict[str, Any] = field(default_factory=dict)

    def whole(self, pattern: str, text: str) -> bool:
        """As `re.fullmatch`: how peft reads target_modules and exclude_modules."""
        return self._match(pattern, pattern, text)

    def names(self, pattern: str, module: str) -> bool:
        """Whether a key of rank_pattern or alpha_pattern names the module, by its last parts."""
        return self._match(pattern, rf"(.*\.)?({pattern})", module)

    def value(self, values: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
        """The value of the first key that names the module, as in peft."""
        named = (value for key, value in (values or {}).items() if self.names(key, module))
        return next(named, otherwise)

    def _match(self, pattern: str, whole: str, text: str) -> bool:
        started = time.thread_time()
        try:
            compiled = self._compiled.get(whole) or self._compile(pattern, whole)
            return compiled.fullmatch(text, timeout=max(self.left, 1e-3)) is not None
        except TimeoutError:
            raise self._bad(
                pattern,
                f"takes more than {MAX_SECONDS:g} s on the names of the base's modules, with all"
                f" {len(self._compiled)} that were compiled",
            ) from None
        finally:
            self.left -= time.thread_time() - started

    def _compile(self, pattern: str, whole: str) -> Any:
        if self.left < 0:
            raise TimeoutError
        if len(pattern) > MAX_LENGTH:
            raise self._bad(pattern, f"has {len(pattern)} characters")
        counts = [max(int(n or 1) for n in pair) for pair in _COUNT.findall(pattern)]
        if prod(counts) > MAX_COUNT:
            raise self._bad(pattern, f"counts to {prod(counts)}")
        if found := _DIFFERS.search(pattern.replace("\\\\", "").replace("\\{", "")):
            raise self._bad(pattern, f"holds {found[0]!r}")
        try:
            re.compile(pattern)  # by itself, too: brackets in it could close those around it
            re.compile(whole)
            self._compiled[whole] = compiled = regex.compile(whole)
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise self._bad(pattern, f"is broken ({str(error)[:80]})") from None
        return compiled

    def _bad(self, pattern: str, reason: str) -> UserError:
        short = pattern if len(pattern) <= 60 else f"{pattern[:60]}..."
        return UserError(
            f"{self.folder}: the pattern {short!r} in adapter_config.json {reason}; expected a"
            f" simple regular expression of at most {MAX_LENGTH} characters"
        )
