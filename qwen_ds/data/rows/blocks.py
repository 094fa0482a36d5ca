"""Blocks of token rows, as arrays: the result of a worker process for a chunk of conversations.

A label is its own token or IGNORE, so a block keeps tokens once and, of the labels, only the runs
of target tokens.

Shapes: K rows of a block, N tokens of all its rows, R runs of target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    ids_N: np.ndarray
    """int32, the rows' tokens one after another."""
    runs_R2: np.ndarray
    """int32, start and end of each run of target tokens, counted from the start of its row."""
    place_K: np.ndarray
    """int32, place in the chunk of the conversation that a row comes from, ascending."""
    length_K: np.ndarray
    """int32, tokens of each row."""
    n_runs_K: np.ndarray
    """int32, runs of each row."""
    learnt_K: np.ndarray
    """int32, target tokens of each row, counted after the shift by one."""
    content_K: np.ndarray
    """uint64, hash of a row's tokens and labels."""
    prompt_K: np.ndarray
    """uint64, hash of a row's first user text."""
    dropped: list[tuple[int, str]]
    """(place in the chunk, reason) of conversations that give no row."""
    cuts: list[tuple[int, str]]
    """(place in the chunk, what was cut) of rows that were too long; a row can appear twice."""


def encode_block(
    encoding: Encoding, conversations: Sequence[Conversation], options: EncodeOptions
) -> Block:
    """Encode conversations; those with fewer than two tokens or without a target are dropped."""
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
        if reason is None and all(label == IGNORE for label in row.labels[1:]):
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
    """(runs_R2, n_runs_K, learnt_K) of concatenated rows."""
    learnt_N = labels_N != IGNORE
    assert (labels_N[learnt_N] == ids_N[learnt_N]).all(), "a label is its own token or IGNORE"
    end_K = np.cumsum(length_K, dtype=np.int64)
    start_K = end_K - length_K
    # A run begins at a target that follows none, or opens its row; it ends likewise.
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
