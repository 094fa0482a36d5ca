"""How much of a file may be in memory, and how far a packed one may unfold, as a recipe says it."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from qwen_ds.errors import UserError

MB = 1_000_000
# Every packed file may unfold to this, however small it is.
_FREE_BYTES = 256 * MB


class Readable(Protocol):
    """A stream of bytes that is read from its beginning to its end."""

    def read(self, size: int, /) -> bytes: ...


class LimitReached(Exception):
    """A limit that the input goes beyond. Not a ValueError: libraries that call us back take that
    for damage of their own formats and go on."""


def ignore(file: str, note: str) -> None:
    """Take a note about a file and say nothing."""


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How files are read, and who is told what became of them."""

    encoding: str = "auto"  # a codec, or auto: each file's own bytes tell
    max_row_mb: int = 64
    max_expansion: int = 200
    split: str | None = None  # of a file that holds several; None: train
    on_encoding: Callable[[str, str], None] = field(default=ignore, compare=False)
    """Told (file, encoding) of text that is not UTF-8."""
    on_left_out: Callable[[str, str], None] = field(default=ignore, compare=False)
    """Told (file, reason) of a file of a folder or an archive that is not read."""

    def __post_init__(self) -> None:
        try:
            if self.encoding != "auto":
                "{".encode(codecs.lookup(self.encoding).name)  # not all codecs are of text
        except (LookupError, ValueError):
            raise UserError(
                f"data.encoding is {self.encoding!r}; expected auto or the name of an encoding, "
                "such as utf-8, gb18030, big5, euc_kr, shift_jis, cp1252"
            ) from None

    def told_by(self, say: Callable[[str], None]) -> FileOptions:
        """These options, with `say` told in words what becomes of files."""
        return replace(
            self,
            on_encoding=lambda file, encoding: say(f"{file}: read as {encoding}"),
            on_left_out=lambda file, reason: say(f"{file}: not read, {reason}"),
        )

    @property
    def row_bytes(self) -> int:
        return self.max_row_mb * MB

    def too_long(self, source: str) -> LimitReached:
        """The error of a row that is longer than `row_bytes`."""
        return LimitReached(
            f"{source}: a row of more than {self.max_row_mb} MB; expected less, or a higher "
            "data.max_row_mb"
        )


DEFAULT = FileOptions()


class Budget:
    """The bytes that a packed file or an archive may unfold to, all its members together."""

    def __init__(self, name: str, packed_bytes: int, options: FileOptions) -> None:
        self.name, self.times = name, options.max_expansion
        self.limit = max(_FREE_BYTES, packed_bytes * options.max_expansion)
        self.left = self.limit

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise LimitReached(
                f"{self.name}: unfolds to more than {self.limit // MB} MB, {self.times} times its "
                "size; expected less, or a higher data.max_expansion"
            )


class Budgeted:
    """A stream whose bytes count against a budget."""

    def __init__(self, stream: Readable, budget: Budget) -> None:
        self._stream, self._budget = stream, budget

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._budget.spend(len(data))
        return data


class Rewound:
    """A stream that has been read a little, from its beginning again."""

    def __init__(self, head: bytes, rest: Readable) -> None:
        self._head, self._at, self._rest = head, 0, rest

    def read(self, size: int = -1, /) -> bytes:
        if self._at < len(self._head) and size != 0:
            end = len(self._head) if size < 0 else self._at + size
            data = self._head[self._at : end]
            self._at += len(data)
            return data if size >= 0 else data + self._rest.read(-1)
        return self._rest.read(size)
