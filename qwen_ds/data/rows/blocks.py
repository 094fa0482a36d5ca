"""Some hundred conversations -> one block of token rows, in arrays: what worker processes make and the cache stores.

A label is its own token or IGNORE, so a block keeps tokens once and, of the labels, only the runs that are learnt.

Shapes: K rows of a block, N tokens of all its rows, R runs of learnt tokens.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from qwen_ds.data.rows.encode import EncodeOptions, encode_row
from qwen_ds.model.chatml import IGNORE, Conversation
from qwen_ds.model.tokenizer import Encoding

TOO_SHORT, NOTHING_TO_LEARN = "fewer than 2 tokens", "nothing to learn"
PROMPT_CUT, ANSWER_CUT, TURNS_DROPPED = "prompt cut", "answer cut", "oldest turns dropped"

_DTYPES = tuple(np.dtype(name) for name in ("<i4", "<i4", "<i4", "<i4", "<i4", "<i4", "<u8", "<u8"))


@dataclass(frozen=True, slots=True)
class Block:
    ids_N: np.ndarray
    """int32, the rows' tokens one after another."""
    runs_R2: np.ndarray
    """int32, start and end of each run of learnt tokens, counted from the start of its row."""
    place_K: np.ndarray
    """int32, which conversation of the chunk a row is, ascending."""
    length_K: np.ndarray
    """int32, tokens of each row."""
    n_runs_K: np.ndarray
    """int32, runs of each row."""
    learnt_K: np.ndarray
    """int32, labels that count: those left after the shift by one."""
    content_K: np.ndarray
    """uint64, hash of a row's tokens and labels."""
    prompt_K: np.ndarray
    """uint64, hash of a row's first user text."""
    dropped: list[tuple[int, str]]
    """(place in the chunk, reason) of conversations that give no row."""
    cuts: list[tuple[int, str]]
    """(place in the chunk, what was cut) of rows that were too long; a row can stand here twice."""

    def to_bytes(self) -> bytes:
        """All of it as bytes, for the way between processes."""
        arrays = (
            self.ids_N,
            self.runs_R2,
            self.place_K,
            self.length_K,
            self.n_runs_K,
            self.learnt_K,
            self.content_K,
        )
        raw = [array.tobytes() for array in (*arrays, self.prompt_K)]
        header = json.dumps([[len(part) for part in raw], self.dropped, self.cuts]).encode()
        return b"".join([struct.pack("<I", len(header)), header, *raw])

    @classmethod
    def from_bytes(cls, data: bytes) -> Block:
        (n_header,) = struct.unpack_from("<I", data)
        sizes, dropped, cuts = json.loads(data[4 : 4 + n_header])
        start, arrays = 4 + n_header, []
        for size, dtype in zip(sizes, _DTYPES, strict=True):
            arrays.append(np.frombuffer(data, dtype, size // dtype.itemsize, start))
            start += size
        ids_N, runs_2R, place_K, length_K, n_runs_K, learnt_K, content_K, prompt_K = arrays
        return cls(
            ids_N,
            runs_2R.reshape(-1, 2),
            place_K,
            length_K,
            n_runs_K,
            learnt_K,
            content_K,
            prompt_K,
            [(place, reason) for place, reason in dropped],
            [(place, what) for place, what in cuts],
        )


def encode_block(
    encoding: Encoding, conversations: Sequence[Conversation], options: EncodeOptions
) -> Block:
    """Encode conversations one by one; what gives no row of two tokens or nothing to learn is dropped with a reason."""
    ids: list[int] = []
    labels: list[int] = []
    places: list[int] = []
    lengths: list[int] = []
    prompts: list[bytes] = []
    dropped: list[tuple[int, str]] = []
    cuts: list[tuple[int, str]] = []
    for place, conversation in enumerate(conversations):
        row = encode_row(encoding, conversation, options)
        reason = row.dropped
        if reason is None and len(row.ids) < 2:
            reason = TOO_SHORT
        if reason is None and row.labels.count(IGNORE) == len(row.labels) - (
            row.labels[0] != IGNORE
        ):
            reason = NOTHING_TO_LEARN  # the first label never counts: nothing predicts it
        if reason is not None:
            dropped.append((place, reason))
            continue
        ids += row.ids
        labels += row.labels
        places.append(place)
        lengths.append(len(row.ids))
        prompts.append(_prompt_hash(conversation))
        for what, was_cut in (
            (PROMPT_CUT, row.prompt_cut),
            (ANSWER_CUT, row.answer_cut),
            (TURNS_DROPPED, row.turns_dropped > 0),
        ):
            if was_cut:
                cuts.append((place, what))
    ids_N, labels_N = np.array(ids, "<i4"), np.array(labels, "<i4")
    length_K = np.array(lengths, "<i4")
    runs_R2, n_runs_K, learnt_K = _learnt_runs(ids_N, labels_N, length_K)
    return Block(
        ids_N,
        runs_R2,
        np.array(places, "<i4"),
        length_K,
        n_runs_K,
        learnt_K,
        _content_hashes(ids_N, labels_N, length_K),
        np.frombuffer(b"".join(prompts), "<u8"),
        dropped,
        cuts,
    )


def _learnt_runs(
    ids_N: np.ndarray, labels_N: np.ndarray, length_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(runs_R2, n_runs_K, learnt_K) of rows that lie one after another."""
    learnt_N = labels_N != IGNORE
    assert (labels_N[learnt_N] == ids_N[learnt_N]).all(), "a label is its own token or IGNORE"
    end_K = np.cumsum(length_K, dtype=np.int64)
    start_K = end_K - length_K
    # A run begins where a learnt token follows none, or opens its row; it ends likewise.
    before_N = np.concatenate([[False], learnt_N[:-1]])[: len(learnt_N)]
    before_N[start_K] = False
    after_N = np.concatenate([learnt_N[1:], [False]])[: len(learnt_N)]
    after_N[end_K - 1] = False
    begins_R = np.flatnonzero(learnt_N & ~before_N)
    ends_R = np.flatnonzero(learnt_N & ~after_N) + 1
    row_R = np.searchsorted(end_K, begins_R, side="right")
    runs_R2 = np.stack([begins_R - start_K[row_R], ends_R - start_K[row_R]], axis=1).astype("<i4")
    n_runs_K = np.bincount(row_R, minlength=len(length_K)).astype("<i4")
    counted_N = learnt_N.copy()
    counted_N[start_K] = False  # nothing predicts a row's first token
    upto = np.concatenate([[0], np.cumsum(counted_N)])
    return runs_R2, n_runs_K, (upto[end_K] - upto[start_K]).astype("<i4")


def _content_hashes(ids_N: np.ndarray, labels_N: np.ndarray, length_K: np.ndarray) -> np.ndarray:
    hashes, start = [], 0
    for length in length_K.tolist():
        end = start + length
        hashes.append(
            blake2b(
                ids_N[start:end].tobytes() + labels_N[start:end].tobytes(), digest_size=8
            ).digest()
        )
        start = end
    return np.frombuffer(b"".join(hashes), "<u8")


def _prompt_hash(conversation: Conversation) -> bytes:
    text = next((turn.text for turn in conversation.turns if turn.role == "user"), "")
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
