"""Blocks of token rows, as arrays: the result of a worker process for a chunk of conversations.

A label is its own token or IGNORE, so a block keeps tokens once and, of the labels, only the runs
of target tokens.

Shapes: K rows of a block, N tokens of all its rows, R runs of target tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from qwen_ds.data.rows.encode import EncodeOptions, encode_row
from qwen_ds.model.chatml import IGNORE, Conversation
from qwen_ds.model.tokenizer import Encoding

TOO_SHORT, NOTHING_TO_LEARN = "fewer than 2 tokens", "nothing to learn"
PROMPT_CUT, ANSWER_CUT, TURNS_DROPPED = "prompt cut", "answer cut", "oldest turns dropped"


@dataclass(frozen=True, slots=True)
class Block:
    """The rows of one chunk, and what became of its other conversations."""

    ids_N: np.ndarray  # int32, the rows' tokens one after another
    runs_R2: np.ndarray  # int32, start and end of each run of target tokens, counted in its row
    place_K: np.ndarray  # int32, place in the chunk of a row's conversation, ascending
    length_K: np.ndarray  # int32, tokens of each row
    n_runs_K: np.ndarray  # int32, runs of each row
    learnt_K: np.ndarray  # int32, target tokens of each row, counted after the shift by one
    content_K: np.ndarray  # uint64, hash of a row's tokens and labels
    prompt_K: np.ndarray  # uint64, hash of a row's first user text
    dropped: list[tuple[int, str]]  # (place in the chunk, reason) of conversations that give no row
    cuts: list[tuple[int, str]]
    """(place in the chunk, what was cut) of rows that were too long; a row can appear twice."""


def encode_block(
    encoding: Encoding, conversations: Sequence[Conversation], options: EncodeOptions
) -> Block:
    """Encode conversations; those with fewer than two tokens or without a target are dropped."""
    rows_2T: dict[int, np.ndarray] = {}  # tokens and labels, by place in the chunk
    dropped: list[tuple[int, str]] = []
    cuts: list[tuple[int, str]] = []
    for place, conversation in enumerate(conversations):
        row = encode_row(encoding, conversation, options)
        reason = row.dropped
        if reason is None and len(row.ids) < 2:
            reason = TOO_SHORT
        if reason is None and all(label == IGNORE for label in row.labels[1:]):
            reason = NOTHING_TO_LEARN  # the first label never counts: nothing predicts it
        if reason is not None:
            dropped.append((place, reason))
            continue
        rows_2T[place] = np.array([row.ids, row.labels], "<i4")
        lost = {
            PROMPT_CUT: row.prompt_cut,
            ANSWER_CUT: row.answer_cut,
            TURNS_DROPPED: row.turns_dropped > 0,
        }
        cuts += [(place, what) for what, was_cut in lost.items() if was_cut]
    ids_N, labels_N = np.concatenate([np.empty((2, 0), "<i4"), *rows_2T.values()], axis=1)
    length_K = np.array([row_2T.shape[1] for row_2T in rows_2T.values()], "<i4")
    runs_R2, n_runs_K, learnt_K = _targets(ids_N, labels_N, length_K)
    place_K = np.array(list(rows_2T), "<i4")
    content_K = _hashes(row_2T.tobytes() for row_2T in rows_2T.values())
    prompt_K = _hashes(_first_question(conversations[place]) for place in rows_2T)
    return Block(
        ids_N, runs_R2, place_K, length_K, n_runs_K, learnt_K, content_K, prompt_K, dropped, cuts
    )


def _targets(
    ids_N: np.ndarray, labels_N: np.ndarray, length_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(runs_R2, n_runs_K, learnt_K) of concatenated rows."""
    learnt_N = labels_N != IGNORE
    assert (labels_N[learnt_N] == ids_N[learnt_N]).all(), "a label is its own token or IGNORE"
    end_K = np.cumsum(length_K, dtype=np.int64)
    start_K = end_K - length_K
    # With a gap after each row no run reaches into the next; row k begins k gaps later.
    with_gaps = np.insert(learnt_N, end_K, False)
    runs_R2 = np.flatnonzero(np.diff(with_gaps, prepend=False)).reshape(-1, 2)
    begin_K = start_K + np.arange(len(start_K))
    row_R = np.searchsorted(begin_K, runs_R2[:, 0], side="right") - 1
    n_runs_K = np.bincount(row_R, minlength=len(length_K)).astype("<i4")
    # Nothing predicts a row's first token.
    learnt_K = np.add.reduceat(learnt_N, start_K, dtype="<i4") - learnt_N[start_K]
    return (runs_R2 - begin_K[row_R, None]).astype("<i4"), n_runs_K, learnt_K


def _hashes(contents: Iterable[bytes]) -> np.ndarray:
    """uint64, one for each of the contents."""
    digests = (blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(b"".join(digests), "<u8")


def _first_question(conversation: Conversation) -> bytes:
    text = next((turn.text for turn in conversation.turns if turn.role == "user"), "")
    return text.encode("utf-8", "surrogatepass")
