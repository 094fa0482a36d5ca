"""Keys and values of running requests: their pages, and attention over packed rows.

A decoding step runs one sequence of N tokens: the next token of each row that decodes, then pieces
of prompts. All that a model does token by token needs to know nothing of rows. Only attention does,
and it asks the store, which holds each row's earlier keys and values.

Room is counted in pages of `page_size` tokens. Whole pages of a prompt are shared with later
requests, by a key of everything that their content follows from (see `page_keys`).

Shapes: N new tokens of all rows, H heads, W head width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PageKey = bytes


@dataclass(frozen=True, slots=True)
class KVShape:
    """Sizes of the keys and values that one token adds."""

    layers: int
    heads: int  # of keys and values
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize


class PackedCache(ABC):
    """The cache of a forward of packed rows: it does the attention, too."""

    num_keys: int = 0
    """Tokens of the longest row in this step, new ones included."""

    @abstractmethod
    def attend(self, q_NHW: Tensor, k_NHW: Tensor, v_NHW: Tensor, layer: int) -> Tensor:
        """Keep the new keys and values, and let each token attend to its row up to itself: [N, H,
        W]. q and k are rotated already."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: as transformers' caches are asked. A step's positions are given by its caller."""
        return 0


class StoredRow:
    """One request's keys and values in a store."""

    __slots__ = ("length", "pages", "place")

    def __init__(self) -> None:
        self.length = 0  # tokens whose keys and values are there
        self.pages = 0
        self.place: object = None  # the store's own


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one row among the N of a step."""

    row: StoredRow
    start: int
    count: int


class KVStore(PackedCache):
    """Room for `num_pages` pages, given to rows as they grow.

    A row that is closed leaves its published pages behind, for requests that begin alike, until
    their room is needed; the least recently used go first.
    """

    def __init__(self, shape: KVShape, num_pages: int, page_size: int) -> None:
        self.shape, self.num_pages, self.page_size = shape, num_pages, page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    @property
    @abstractmethod
    def available_pages(self) -> int:
        """Pages that no open row has."""

    @abstractmethod
    def open(self, keys: Sequence[PageKey]) -> StoredRow:
        """A new row that begins with as many of these pages as are there and room allows."""

    @abstractmethod
    def grow(self, row: StoredRow, tokens: int) -> bool:
        """Make room for so many tokens of a row in all; false if there is none, and nothing is
        done."""

    @abstractmethod
    def publish(self, row: StoredRow, keys: Sequence[PageKey]) -> None:
        """Let other rows share the first len(keys) pages of a row, which are full."""

    @abstractmethod
    def close(self, row: StoredRow) -> None:
        """Give a row's room back."""

    @abstractmethod
    def plan(self, segments: Sequence[Segment]) -> None:
        """Prepare a step in which each segment follows the `length` tokens of its row. Those of one
        token come first. Room must have been made."""


def page_keys(
    tokens: Sequence[int], page_size: int, adapter: str | None, alpha: int
) -> list[PageKey]:
    """Keys of the full pages of a row, each with all that comes before it.

    Keys and values follow from the tokens up to here, from the adapter, and from alpha of dynamic
    NTK, by which K is rotated: a longer prompt that begins with the same tokens may have another
    (test_rows_of_another_alpha_share_nothing).
    """
    key = hashlib.blake2b(f"{alpha}:{adapter!r}".encode(), digest_size=16).digest()
    keys = []
    for end in range(page_size, len(tokens) + 1, page_size):
        page = array("q", tokens[end - page_size : end]).tobytes()
        key = hashlib.blake2b(key + page, digest_size=16).digest()
        keys.append(key)
    return keys


def pages_in(memory_bytes: float, shape: KVShape, page_size: int) -> int:
    """Whole pages that a memory budget holds."""
    return int(memory_bytes // (shape.bytes_per_token * page_size))
