"""Equal and nearly equal conversations, from a few numbers a conversation.

Exact duplicates have equal 64-bit hashes of their texts without white space. For near ones a
text, without punctuation too, is a set of shingles, the 8 bytes of UTF-8 at each of its characters:
about three Chinese characters, or eight Latin ones. rensa makes MinHash digests of these sets; the
share of equal places in two digests estimates the Jaccard similarity of the sets. Of each number 16
bits are kept, so four of them are the 64-bit key of one of 16 bands: conversations that share a key
are compared. A million conversations take 230 MB.

Shapes: N conversations, K places of a digest.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rensa import RMinHash
from xxhash import xxh3_64_intdigest

WHOLE, SIDE = 64, 16  # places of the digest of all of a conversation, and of each of its sides
BAND = 4  # places of a band's key: 16 bands find 98 of 100 pairs of similarity 0.7, all of 0.85
# One word changed in a short text changes more of it than in a long one: the similarity asked for
# grows from the first to the second between so many shingles.
SIMILAR, SIDE_SIMILAR = (0.7, 0.8), 0.25
SHORT, LONG = 30, 90
LEAST_SHINGLES = 14  # below, similarity says little
_NOT_WORD = re.compile(r"[\W_]+")
_SEED = 42
_GAP = b"\0" * 8
_NOT_DIGITS = bytes(set(range(256)) - set(b"0123456789"))


class Signatures(NamedTuple):
    """The numbers by which conversations are compared."""

    whole_N: np.ndarray  # uint64, hash of the conversation
    asked_N: np.ndarray  # uint64, hash of all before the last answer
    said_N: np.ndarray  # uint64, hash of the last answer
    digits_N: np.ndarray  # uint32, checksum of all digits: other numbers are another task
    shingles_N: np.ndarray  # int32
    said_chars_N: np.ndarray  # int32, of the last answer
    digest_NK: np.ndarray  # uint16 [N, 64 + 16 + 16]: whole, question, answer


def signatures(sides: Sequence[tuple[str, str]]) -> Signatures:
    """Signatures of (all before the last answer, the last answer)."""
    asked = ["".join(question.split()).encode("utf-8", "surrogatepass") for question, _ in sides]
    said = ["".join(answer.split()).encode("utf-8", "surrogatepass") for _, answer in sides]
    whole = [q + b"\n" + a for q, a in zip(asked, said, strict=True)]
    plain = [[_NOT_WORD.sub("", text).encode() for text in side] for side in sides]
    digest, shingles = _digests([b" ".join(side) for side in plain], WHOLE)
    digests = [digest, *(_digests([side[at] for side in plain], SIDE)[0] for at in (0, 1))]
    return Signatures(
        np.array([xxh3_64_intdigest(text) for text in whole], np.uint64),
        np.array([xxh3_64_intdigest(text) for text in asked], np.uint64),
        np.array([xxh3_64_intdigest(text) for text in said], np.uint64),
        np.array([zlib.crc32(text.translate(None, _NOT_DIGITS)) for text in whole], np.uint32),
        shingles,
        np.array([len(answer) for _, answer in sides], np.int32),
        np.concatenate(digests, axis=1),
    )


def _digests(texts: Sequence[bytes], places: int) -> tuple[np.ndarray, np.ndarray]:
    """(digests uint16 [N, places], number of shingles [N])."""
    lens = np.array([len(text) for text in texts])
    raw = np.frombuffer(_GAP.join([*texts, b""]), np.uint8)
    starts = np.cumsum(lens + len(_GAP)) - lens - len(_GAP)
    count = len(raw) - len(_GAP)
    if count <= 0:
        return np.zeros((len(texts), places), np.uint16), np.zeros(len(texts), np.int32)
    # A shingle begins at a character; the gaps are no part of any.
    begins = np.flatnonzero(((raw[:count] & 0xC0) != 0x80) & (raw[:count] != 0))
    grams = np.ndarray((count,), "<u8", raw.tobytes(), strides=(1,))[begins]
    grams = grams * np.uint64(0x9E3779B97F4A7C15)
    grams ^= grams >> np.uint64(32)
    offsets = np.searchsorted(begins, np.append(starts, len(raw))).astype(np.uint64)
    rows = RMinHash.digest_matrix_from_flat_token_hashes(grams, offsets, places, _SEED).to_rows()
    return np.array(rows, np.uint32).astype(np.uint16), np.diff(offsets).astype(np.int32)


def joined(parts: list[Signatures]) -> Signatures:
    """All signatures as one. The list is emptied, so that nothing is held twice for long."""
    columns = [list(each) for each in zip(*parts, strict=True)]
    parts.clear()
    made = []
    while columns:
        column = columns.pop(0)
        made.append(np.concatenate(column))
        del column
    return Signatures(*made)


@dataclass(frozen=True, slots=True)
class Repeat:
    """A conversation that says again what an earlier one says."""

    at: int
    of: int  # the earlier one
    near: bool


def repeats(found: Signatures) -> Iterator[Repeat]:
    """Exact duplicates, then near ones, each against the first of its group."""
    first_of = first_with(found.whole_N)
    is_copy = first_of != np.arange(len(first_of))
    for at in np.flatnonzero(is_copy).tolist():
        yield Repeat(at, int(first_of[at]), near=False)
    partner = _near(found, np.flatnonzero(~is_copy & (found.shingles_N >= LEAST_SHINGLES)))
    for at in np.flatnonzero(partner >= 0).tolist():
        yield Repeat(at, int(partner[at]), near=True)


def first_with(keys_N: np.ndarray) -> np.ndarray:
    """For each place the first place with the same key."""
    order = np.argsort(keys_N, kind="stable")
    return _firsts(order, _begins(keys_N[order]))


def _begins(sorted_N: np.ndarray) -> np.ndarray:
    """Whether each of sorted keys differs from the one before it, bool [N]."""
    begins = np.ones(len(sorted_N), bool)
    begins[1:] = sorted_N[1:] != sorted_N[:-1]
    return begins


def _firsts(order: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """For each place the first one of its group, from the places in the order of their keys."""
    first = np.empty(len(order), np.int64)
    first[order] = order[begins][np.cumsum(begins) - 1]
    return first


def _near(found: Signatures, places: np.ndarray) -> np.ndarray:
    """For each conversation an earlier one that is nearly equal, -1 without one."""
    partner = np.full(len(found.whole_N), -1, np.int64)
    bands = found.digest_NK[:, :WHOLE].copy().view("<u8")
    for band in range(bands.shape[1]):
        keys = bands[places, band]
        order = np.argsort(keys, kind="stable")
        begins = _begins(keys[order])
        same = np.flatnonzero(~begins)
        if not len(same):
            continue
        at = order[same]
        # Against the first, and against the one before: a group of n costs 2 n comparisons.
        for other in (_firsts(order, begins)[at], order[same - 1]):
            later, earlier = places[at], places[other]
            keep = (partner[later] < 0) & (later != earlier)
            later, earlier = later[keep], earlier[keep]
            alike = _alike(found, later, earlier)
            partner[later[alike]] = earlier[alike]
    return partner


def _alike(found: Signatures, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # With other numbers it is another task, unless the question is the very same.
    alike = found.digits_N[a] == found.digits_N[b]
    alike |= found.asked_N[a] == found.asked_N[b]
    for begin in range(0, len(a), 1 << 16):
        part = slice(begin, begin + (1 << 16))
        same = found.digest_NK[a[part]] == found.digest_NK[b[part]]
        edges = ((0, WHOLE), (WHOLE, WHOLE + SIDE), (WHOLE + SIDE, WHOLE + 2 * SIDE))
        whole, asked, said = (same[:, first:last].mean(axis=1) for first, last in edges)
        length = np.minimum(found.shingles_N[a[part]], found.shingles_N[b[part]])
        least = np.interp(length, (SHORT, LONG), SIMILAR)
        alike[part] &= (whole >= least) & (asked >= SIDE_SIMILAR) & (said >= SIDE_SIMILAR)
    return alike


def groups(keys_N: np.ndarray, others_N: np.ndarray, least: int) -> np.ndarray:
    """Places whose key comes with at least so many different values of `others_N`."""
    order = np.lexsort((others_N, keys_N))
    new_key = _begins(keys_N[order])
    new_pair = new_key | _begins(others_N[order])
    group = np.cumsum(new_key) - 1
    distinct = np.bincount(group, weights=new_pair)
    return np.sort(order[distinct[group] >= least])
